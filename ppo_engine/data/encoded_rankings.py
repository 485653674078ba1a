"""Rankings as token ids: what a reward model reads of each response, and is scored on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from ppo_engine.data.preferences import Ranking, count_pairs
from ppo_engine.data.rows import BadLines, OnBadLine, SkippedLines
from ppo_engine.data.split import prompt_groups
from ppo_engine.data.unseen import remark_unseen
from ppo_engine.errors import UserError
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import TemplateError, thought_of


@dataclass(frozen=True)
class EncodedRanking:
    """A `Ranking` as token sequences, prompt and response each, the best first."""

    rows: list[list[int]]
    ranks: list[int]
    margin: float | None
    group: int  # index of its prompt
    place: str = field(default="", repr=False)  # its row's in the data
    truncated: tuple[int, ...] = field(default=(), repr=False)  # tokens of each of `rows`

    def __len__(self) -> int:
        """Tokens of the longest row, which is what a micro-batch is padded to."""
        return max(map(len, self.rows))


def encode_rankings(
    renderer: Renderer,
    rankings: Sequence[Ranking],
    limit: int,
    *,
    name: str,
    on_bad_line: OnBadLine = "error",
) -> tuple[list[EncodedRanking], SkippedLines, list[str]]:
    """The token ids of `rankings`, truncated to `limit`; what was left out; and notes on what
    became of the others. `name` says which rankings these are.

    Of responses that are equal once truncated only the best is kept; a ranking left without a pair
    is dropped.
    """
    bad_lines = BadLines(on_bad_line)
    encoded, cut, same, alone, thoughtless = [], 0, 0, 0, 0
    groups = {i: group for group, found in enumerate(prompt_groups(rankings)) for i in found}
    for index, ranking in enumerate(rankings):
        try:
            full = _dialogues(renderer, ranking, sys.maxsize)
            remark_unseen(bad_lines, renderer.template, ranking.prompt, ranking.options)
        except TemplateError as error:  # such as "roles must alternate"
            bad_lines.add(ranking.place, error.reason, error.detail)
            continue
        thoughtless += _lose_thoughts(renderer, ranking, full)
        long = max(map(len, full)) > limit
        cut += long
        ids = _dialogues(renderer, ranking, limit) if long else full
        kept = [i for i, row in enumerate(ids) if row not in ids[:i]]
        same += len(kept) < len(ids)
        ranks = [ranking.ranks[i] for i in kept]
        if count_pairs(ranks):
            encoded.append(
                EncodedRanking(
                    [ids[i] for i in kept],
                    ranks,
                    ranking.margin,
                    groups[index],
                    ranking.place,
                    tuple(len(full[i]) - len(ids[i]) for i in kept),
                )
            )
        else:
            alone += 1
    lost = f"the chat template leaves out the thoughts in the responses of {thoughtless}"
    if rankings and not encoded:
        refused = f"; {bad_lines.skipped}" if bad_lines.skipped.total else ""
        refused = f"; {lost}{refused}" if thoughtless else refused
        raise UserError(
            f"No {name} preference is left: within {limit} tokens (data.max_tokens, or the "
            f"model's context), the responses of {same} are the same{refused}."
        )
    notes = []
    if thoughtless:
        notes.append(f"Of {len(rankings)} {name} preferences {lost}: the model does not read them.")
    if cut:
        notes.append(
            f"{cut} of {len(rankings)} {name} preferences were truncated to {limit} tokens "
            "(data.max_tokens, or the model's context)."
        )
    if same:
        notes.append(
            f"{same} {name} preferences have responses with the same tokens: of these, "
            "only the best is kept."
            + f" That leaves {alone} without a pair, and they are left out."
            * bool(alone)
        )
    return encoded, bad_lines.skipped, notes


def _lose_thoughts(renderer: Renderer, ranking: Ranking, rows: list[list[int]]) -> bool:
    """Whether a response has a thought that is not among the tokens of its row."""
    for response, ids in zip(ranking.responses, rows, strict=True):
        message = {"content": response} if isinstance(response, str) else response
        thought = "".join(thought_of(message).split())
        if thought and thought not in "".join(str(renderer.tokenizer.decode(ids)).split()):
            return True
    return False


def _dialogues(renderer: Renderer, ranking: Ranking, limit: int) -> list[list[int]]:
    ended = ranking.finished or [True] * len(ranking.responses)
    return [
        renderer.scored(
            ranking.prompt,
            response if isinstance(response, str) else [response],
            finished=finished,
            max_tokens=limit,
            options=ranking.options,
        )
        for response, finished in zip(ranking.responses, ended, strict=True)
    ]

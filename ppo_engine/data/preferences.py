"""Preferences: every accepted form in, rankings out.

A line that cannot be used is an error naming `file:line`, or is counted and reported where
`on_bad_line="skip"`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_engine.data.annotations import ordinary_rows
from ppo_engine.data.columns import (
    check_messages,
    check_prompt,
    check_text,
    column,
    is_number,
    kind,
    name_of,
)
from ppo_engine.data.rows import BadLineError, BadLines, OnBadLine, SkippedLines, read_rows
from ppo_engine.errors import UserError
from ppo_engine.text.encoding import Message, Prompt
from ppo_engine.text.template import ChatTemplate


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt, the best first, and their ranks: from 0, equal where tied.

    A preference pair is a ranking of two; `margin` is by how much its first response should be
    ahead, where the data says so. `prompt + response` is the whole text where the prompt is text;
    an empty prompt means that none is known.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    margin: float | None = None
    finished: tuple[bool, ...] | None = None  # whether each response ended with EOS; None: all did
    place: str = field(default="", compare=False)  # its place in the data
    prompt_given: bool = field(default=True, compare=False)  # not just what two whole texts share

    @property
    def pairs(self) -> int:
        return count_pairs(self.ranks)


def count_pairs(ranks: Sequence[int]) -> int:
    """The number of pairs of different ranks."""
    return sum(a != b for index, a in enumerate(ranks) for b in ranks[index + 1 :])


def load_preferences(
    source: str | Path | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    on_bad_line: OnBadLine = "error",
) -> tuple[list[Ranking], SkippedLines]:
    """Pairs and rankings of a file or a sequence of rows, in any of these forms:

    - `chosen`, `rejected`: responses as text, with their `prompt` (text or chat messages);
    - the same without `prompt`: whole texts, whose common prefix is the prompt;
    - chat messages, the last one the assistant's, all before it shared;
    - HH-RLHF dialogues (`\\n\\nHuman: …\\n\\nAssistant: …`), which become chat messages where
      `tokenizer` has a chat template;
    - `prompt`, `responses`, `ranks`: lower is better, equal ranks are ties, and a response whose
      rank is negative or null was not ranked and is left out. With `finished`, as `ppo-engine
      generate` writes it: false for each truncated response, which is then scored without EOS, as
      it will be where a policy is trained;
    - each pair with an optional finite `margin`;
    - records that Argilla or Label Studio exported: see `annotations`.

    Raises `UserError` for a row of another form, or skips it, and if no row is left.
    """
    bad_lines = BadLines(on_bad_line)
    rankings: list[Ranking] = []
    for place, row in ordinary_rows(read_rows(source, "preferences", bad_lines), bad_lines):
        try:
            found = _ranking_of(row, bool(tokenizer.chat_template))
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        if found.pairs:
            rankings.append(replace(found, place=place))
        else:  # no mistake: people do find all responses equally good
            bad_lines.skipped.add(place, "no two responses with different ranks")
    if not rankings:
        raise UserError(
            f"No usable preference pair or ranking in {name_of(source)}: {bad_lines.skipped}."
        )
    if any(not isinstance(ranking.prompt, str) for ranking in rankings):
        ChatTemplate(tokenizer).require()
    return rankings, bad_lines.skipped


def sample_rankings(rankings: Sequence[Ranking], max_pairs: int, seed: int) -> list[Ranking]:
    """A random sample of whole rankings, of at most `max_pairs` pairs in all, in their order.
    A `UserError` if none fits."""
    if sum(ranking.pairs for ranking in rankings) <= max_pairs:
        return list(rankings)
    chosen, room = [], max_pairs
    # A sample, not the start: files are often sorted.
    for index in random.Random(seed).sample(range(len(rankings)), len(rankings)):
        if not room:
            break
        if rankings[index].pairs <= room:
            chosen.append(index)
            room -= rankings[index].pairs
    if not chosen:
        raise UserError(
            f"data.max_pairs={max_pairs} is less than the number of pairs in any ranking "
            f"(at least {min(ranking.pairs for ranking in rankings)}): raise it."
        )
    return [rankings[index] for index in sorted(chosen)]


def _ranking_of(row: Any, chat: bool) -> Ranking:
    if not isinstance(row, Mapping):
        raise BadLineError("a preference must be a dictionary", f", not {kind(row)}")
    if "responses" in row or "ranks" in row:
        return _ranked_responses(row, chat)
    chosen, rejected = column(row, "chosen"), column(row, "rejected")
    prompt = check_prompt(row["prompt"]) if row.get("prompt") is not None else None
    margin = _check_margin(row.get("margin"))
    given = True
    if isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = check_text(chosen, "chosen"), check_text(rejected, "rejected")
        if prompt is not None:
            prompt = chat_if_dialogue(prompt, chat)
        elif _is_dialogue(chosen) and _is_dialogue(rejected):
            prompt, chosen, rejected = _split_dialogues(chosen, rejected, chat)
        else:
            prompt, chosen, rejected = _split_texts(chosen, rejected)
            given = False
    else:
        prompt, chosen, rejected = _split_messages(
            prompt, check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
        )
    if chosen == rejected:
        raise BadLineError("chosen and rejected are the same")
    return Ranking(prompt, (chosen, rejected), (0, 1), margin, prompt_given=given)


def _ranked_responses(row: Mapping[str, Any], chat: bool) -> Ranking:
    prompt = chat_if_dialogue(check_prompt(column(row, "prompt")), chat)
    lists = {name: column(row, name) for name in ("responses", "ranks")}
    if row.get("finished") is not None:
        lists["finished"] = row["finished"]
    responses, ranks = lists["responses"], lists["ranks"]
    for name, value in lists.items():
        if not isinstance(value, list | tuple):
            raise BadLineError(f"{name!r} must be a list", f", not {kind(value)}")
        if len(responses) != len(value):
            lengths = f" ({len(responses)} and {len(value)})"
            raise BadLineError(f"'responses' and {name!r} differ in length", lengths)
    for rank in ranks:
        if rank is not None and not is_number(rank):
            raise BadLineError("'ranks' must be numbers or null", f", not {rank!r}")
    finished = lists.get("finished", [True] * len(ranks))
    there = [
        (rank, check_text(response, "responses"), ended)
        for rank, response, ended in zip(ranks, responses, finished, strict=True)
        if rank is not None and rank >= 0
    ]
    for _, _, ended in there:
        if not isinstance(ended, bool):
            raise BadLineError("'finished' must be true or false", f", not {ended!r}")
    there.sort(key=lambda item: item[0])
    if len({item[1:] for item in there}) < len(set(there)):
        raise BadLineError("chosen and rejected are the same", " (two ranked responses)")
    margin = _check_margin(row.get("margin"))
    if margin is not None and len(there) > 2:
        raise BadLineError("'margin' belongs to a pair", f"; {len(there)} responses are ranked")
    places = sorted({rank for rank, _, _ in there})
    return Ranking(
        prompt,
        tuple(text for _, text, _ in there),
        tuple(places.index(rank) for rank, _, _ in there),
        margin,
        tuple(ended for _, _, ended in there) if "finished" in lists else None,
    )


def _split_messages(
    prompt: Prompt | None, chosen: list[Message], rejected: list[Message]
) -> tuple[Prompt, str, str]:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadLineError(f"the last message of {name!r} is not the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise BadLineError("chosen and rejected do not share every message but the last")
    shared = chosen[:-1]
    if isinstance(prompt, str) and not shared:
        shared = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and shared[: len(prompt)] != prompt:
        shared = [*prompt, *shared]
    if not shared:
        raise BadLineError("no prompt: only the assistant's message is there")
    return shared, chosen[-1]["content"], rejected[-1]["content"]


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common prefix is the prompt, up to the last space in it: words stay whole."""
    unequal = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(unequal, min(len(chosen), len(rejected)))]
    shared = shared[: max((space.start() for space in re.finditer(r"\s", shared)), default=0)]
    return shared, chosen[len(shared) :], rejected[len(shared) :]


_TURN = re.compile(r"\n\n(Human|Assistant):")


_ASSISTANT = "\n\nAssistant:"


def _is_dialogue(text: str) -> bool:
    return text.startswith("\n\nHuman:") and _ASSISTANT in text


def _split_dialogues(chosen: str, rejected: str, chat: bool) -> tuple[Prompt, str, str]:
    """HH-RLHF: everything up to the assistant's last turn is shared.

    In a few real dialogues the last turn is several `Assistant:` paragraphs in a row.
    """
    ends = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        start = text.find(_ASSISTANT, text.rfind("\n\nHuman:"))
        if start < 0:
            raise BadLineError(f"the last turn of {name!r} is not the assistant's")
        ends.append(start + len(_ASSISTANT))
    prompt = chosen[: ends[0]]
    if prompt != rejected[: ends[1]]:
        raise BadLineError("chosen and rejected do not share every turn but the last")
    responses = chosen[ends[0] :], rejected[ends[1] :]
    if not chat:
        return prompt, *responses
    better, worse = ("\n\n".join(part.strip() for part in t.split(_ASSISTANT)) for t in responses)
    return chat_if_dialogue(prompt, chat), better, worse


def chat_if_dialogue(prompt: Prompt, chat: bool) -> Prompt:
    """An HH-RLHF prompt as chat messages, neighboring turns of one speaker joined."""
    if not (chat and isinstance(prompt, str) and _is_dialogue(prompt)):
        return prompt
    if not prompt.rstrip().endswith(_ASSISTANT):
        return prompt
    parts = _TURN.split(prompt)[1:-2]  # the last turn is the one to be answered
    messages: list[Message] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def _check_margin(margin: Any) -> float | None:
    if margin is None:
        return None
    if not is_number(margin):
        raise BadLineError("'margin' must be a finite number", f", not {margin!r}")
    return float(margin)

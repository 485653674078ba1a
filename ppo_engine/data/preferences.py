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
from typing import TYPE_CHECKING, Any

from ppo_engine.data.annotations import ordinary_rows
from ppo_engine.data.chat import check_messages, without_flags
from ppo_engine.data.columns import Columns, check_text, is_number, kind, name_of
from ppo_engine.data.dialogues import answer_to, is_dialogue, split_dialogues
from ppo_engine.data.forms import (
    ASKING,
    CHATS,
    PAIRS,
    PROMPTS,
    ChatRules,
    check_prompt,
    complete_prompt,
    names_of_pair,
    take_prompt,
)
from ppo_engine.data.renaming import renamed_rows
from ppo_engine.data.rows import BadLineError, BadLines, OnBadLine, SkippedLines, read_rows
from ppo_engine.errors import UserError
from ppo_engine.text.prompt import Message, Prompt
from ppo_engine.text.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST_MARGIN = 3.4e38  # of a float32

# All columns that are read.
COLUMNS = (
    *ASKING,
    *dict.fromkeys(name for pair in PAIRS for name in pair),
    *("response_0", "response_1", "better_response_id"),
    *("responses", "ranks", "finished", "margin"),
)


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt, the best first, and their ranks: from 0, equal where tied.

    A preference pair is a ranking of two; `margin` is by how much its first response should be
    ahead, where the data says so. `prompt + response` is the whole text where the prompt is text;
    an empty prompt means that none is known. A response is the assistant's message where that
    holds more than its content: thoughts, tool calls.
    """

    prompt: Prompt
    responses: tuple[str | Message, ...]
    ranks: tuple[int, ...]
    margin: float | None = None
    finished: tuple[bool, ...] | None = None  # whether each response ended with EOS; None: all did
    place: str = field(default="", compare=False)  # its place in the data
    prompt_given: bool = field(default=True, compare=False)  # not just what two whole texts share
    options: dict[str, Any] = field(default_factory=dict)  # tools and arguments for the template

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
    as_chat: bool = False,
    columns: Mapping[str, str] | None = None,
    system_prompt: str = "",
) -> tuple[list[Ranking], SkippedLines]:
    """Pairs and rankings of a file or a sequence of rows, in any of these forms:

    - `chosen`, `rejected`: responses as text, with their prompt, in the columns that `forms` names;
    - the same without a prompt: whole texts, whose common prefix is the prompt;
    - chat messages, the last one the assistant's, all before it shared;
    - HH-RLHF dialogues (`\\n\\nHuman: …\\n\\nAssistant: …`), which become chat messages where
      `tokenizer` has a chat template, as every text prompt does with `as_chat`;
    - a prompt, `responses`, `ranks`: lower is better, equal ranks are ties, and a response whose
      rank is negative or null was not ranked and is left out. With `finished`, as `ppo-engine
      generate` writes it: false for each truncated response, which is then scored without EOS, as
      it will be where a policy is trained;
    - each pair with an optional finite `margin`;
    - records that Argilla or Label Studio exported: see `annotations`.

    `columns` and `system_prompt` are those of the settings (`data.columns`, `data.system_prompt`).
    Raises `UserError` for a row of another form, or skips it, and if no row is left.
    """
    rules = ChatRules.of(tokenizer, as_chat, system_prompt)
    bad_lines = BadLines(on_bad_line)
    rankings: list[Ranking] = []
    rows = read_rows(source, "preferences", bad_lines)
    rows = renamed_rows(rows, columns or {}, bad_lines, COLUMNS)
    for place, row in ordinary_rows(rows, bad_lines):
        try:
            there = Columns(row)
            found = _ranking_of(there, rules)
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        bad_lines.skipped.unread.update(there.left)
        distinct = _without_equals(found)
        if distinct.pairs:
            if distinct is not found:
                bad_lines.skipped.remarks[
                    "of equal responses the one with the best rank counts"
                ] += 1
            rankings.append(replace(distinct, place=place))
        elif found.pairs:
            bad_lines.skipped.add(place, "all of the ranked responses are equal")
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


def _ranking_of(columns: Columns, rules: ChatRules) -> Ranking:
    if columns.find(("responses", "ranks")):
        return _ranked_responses(columns, rules)
    names = names_of_pair(columns)
    chosen, rejected = (_text_or_messages(columns, name) for name in names)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadLineError(f"{names[0]!r} and {names[1]!r} must both be text, or both messages")
    # Whole conversations have their prompt: what `messages` holds beside them is none.
    whole = not isinstance(chosen, str) and len(chosen) > 1
    wanted = PROMPTS if whole else (*PROMPTS, *CHATS)
    prompt = _prompt(columns, wanted) if columns.find(wanted) else None
    if _holds_dialogue(chosen, prompt) and _holds_dialogue(rejected, prompt):
        prompt = None  # they bring it along
    margin = _check_margin(columns.take("margin"))
    given = True
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected)
    elif prompt is None and is_dialogue(chosen) and is_dialogue(rejected):
        prompt, chosen, rejected = split_dialogues(chosen, rejected, rules.template)
    elif prompt is None:
        prompt, chosen, rejected = _split_texts(chosen, rejected)
        given = False
    chosen, rejected = (answer_to(prompt, x, chat=rules.template) for x in (chosen, rejected))
    if chosen == rejected:
        raise BadLineError("chosen and rejected are the same")
    prompt, options = complete_prompt(prompt, columns, rules)
    if not (given or isinstance(prompt, str)):
        raise BadLineError("no prompt", ": whole texts cannot be chat messages; add their prompt")
    if not given and isinstance(prompt, str):
        _check_no_prompt(columns, prompt)
    pair = (chosen, rejected)
    return Ranking(prompt, pair, (0, 1), margin, prompt_given=given, options=options)


def _holds_dialogue(text: str | list[Message], prompt: Prompt | None) -> bool:
    """Whether a text begins with the dialogue that is its prompt."""
    if not isinstance(text, str) or not isinstance(prompt, str):
        return False
    return is_dialogue(prompt) and text.startswith(prompt)


def _text_or_messages(columns: Columns, name: str) -> Any:
    value = columns.take(name)
    if isinstance(value, str):
        return check_text(value, name)
    return without_flags(check_messages(value, name))


def _prompt(columns: Columns, names: Sequence[str]) -> Prompt:
    """The prompt's column alone."""
    _, prompt = take_prompt(columns, names)
    return check_prompt(prompt if isinstance(prompt, str) else without_flags(prompt))


def _ranked_responses(columns: Columns, rules: ChatRules) -> Ranking:
    asked = _prompt(columns, (*PROMPTS, *CHATS))
    prompt, options = complete_prompt(asked, columns, rules)
    lists = {name: columns.take_first([name])[1] for name in ("responses", "ranks")}
    if columns.find(["finished"]):
        lists["finished"] = columns.take("finished")
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
        (rank, answer_to(asked, check_response(response), chat=rules.template), ended)
        for rank, response, ended in zip(ranks, responses, finished, strict=True)
        if rank is not None and rank >= 0
    ]
    for _, _, ended in there:
        if not isinstance(ended, bool):
            raise BadLineError("'finished' must be true or false", f", not {ended!r}")
    there.sort(key=lambda item: item[0])
    margin = _check_margin(columns.take("margin"))
    if margin is not None and len(there) > 2:
        raise BadLineError("'margin' belongs to a pair", f"; {len(there)} responses are ranked")
    places = sorted({rank for rank, _, _ in there})
    return Ranking(
        prompt,
        tuple(response for _, response, _ in there),
        tuple(places.index(rank) for rank, _, _ in there),
        margin,
        tuple(ended for _, _, ended in there) if "finished" in lists else None,
        options=options,
    )


def _without_equals(ranking: Ranking) -> Ranking:
    """Of responses that are equal (as texts, and whether they are finished) only the first, which
    is ranked best."""
    ended = ranking.finished or (True,) * len(ranking.responses)
    answers = list(zip(ranking.responses, ended, strict=True))
    kept = [index for index, answer in enumerate(answers) if answer not in answers[:index]]
    if len(kept) == len(answers):
        return ranking
    places = sorted({ranking.ranks[index] for index in kept})
    return replace(
        ranking,
        responses=tuple(ranking.responses[index] for index in kept),
        ranks=tuple(places.index(ranking.ranks[index]) for index in kept),
        finished=ranking.finished and tuple(ranking.finished[index] for index in kept),
    )


def check_response(response: Any) -> str | Message:
    """One of several responses: text, or the assistant's message. A `BadLineError` for any
    other."""
    if isinstance(response, str):
        return check_text(response, "responses")
    if not isinstance(response, list | Mapping):
        raise BadLineError("'responses' must be text or messages", f", not {kind(response)}")
    messages = without_flags(check_messages(response, "responses"))
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadLineError("one of 'responses' is not one message of the assistant's")
    return _text_alone(messages[0])


def _text_alone(message: Message) -> str | Message:
    """The content of a message that has nothing else."""
    return message["content"] if message.keys() == {"role", "content"} else message


def _split_messages(
    prompt: Prompt | None, chosen: list[Message], rejected: list[Message]
) -> tuple[Prompt, str | Message, str | Message]:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadLineError(f"the last message of {name!r} is not the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise BadLineError("chosen and rejected do not share every message but the last")
    shared = chosen[:-1]
    if isinstance(prompt, str):
        asked = [turn["content"].strip() for turn in shared if turn["role"] == "user"]
        if shared and prompt.strip() not in asked:
            raise BadLineError(
                "the prompt is not among the messages that chosen and rejected share",
                ": give it once, as messages or in its own column",
            )
        shared = shared or [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and shared[: len(prompt)] != prompt:
        # All that they share may stand in the prompt too, behind its system message, say.
        shared = prompt if shared and prompt[-len(shared) :] == shared else [*prompt, *shared]
    if not shared:
        raise BadLineError("no prompt: only the assistant's message is there")
    return shared, _text_alone(chosen[-1]), _text_alone(rejected[-1])


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common prefix is the prompt, up to the last space in it: words stay whole."""
    unequal = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = chosen[: next(unequal, min(len(chosen), len(rejected)))]
    shared = shared[: max((space.start() for space in re.finditer(r"\s", shared)), default=0)]
    return shared, chosen[len(shared) :], rejected[len(shared) :]


def _check_no_prompt(columns: Columns, shared: str) -> None:
    """Raises where a column that nobody reads may be the prompt of two whole texts."""
    for name in columns.left:
        text = columns.row.get(name)
        if not isinstance(text, str) or text.strip() in shared:
            continue
        if len(text.split()) > 1 or name.strip().lower() in PROMPTS:
            raise BadLineError(
                f"no prompt, but a column {name!r}",
                ", whose text chosen and rejected do not begin with: name it 'prompt' if that is "
                "what it is, or leave it out",
            )


def _check_margin(margin: Any) -> float | None:
    if margin is None:
        return None
    if not is_number(margin):
        raise BadLineError("'margin' must be a finite number", f", not {margin!r}")
    if abs(margin) > _LARGEST_MARGIN:
        raise BadLineError("'margin' is too large", f": {float(margin):g}")
    return float(margin)

"""Prompts and preference pairs: every accepted form in, one checked form out.

Nothing here trains or tokenizes more than it must; a line that cannot be used is an error naming
`file:line`, or is counted and reported where `on_bad_line="skip"`.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ppo_engine.annotations import ordinary_rows
from ppo_engine.errors import UserError
from ppo_engine.rows import (
    BadLineError,
    BadLines,
    OnBadLine,
    SkippedLines,
    has_lone_surrogate,
    read_rows,
)
from ppo_engine.text import Message, Prompt, encode_prompt, require_chat_template


@dataclass(frozen=True)
class PromptExample:
    """A prompt, the other columns of its row (for the reward function), and where it stood."""

    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, the first preferred, by `margin` where the data says so.

    `prompt + chosen` is the whole text where the prompt is text; an empty prompt means that none
    is known.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None


def load_prompts(
    path: str | Path, *, on_bad_line: OnBadLine = "error"
) -> tuple[list[PromptExample], SkippedLines]:
    """Prompts of a JSONL or parquet file or a saved data set: the column `prompt` of each row.

    A prompt is text or chat messages; the other columns are kept. Raises `UserError` for a row
    without a usable prompt, or skips it, and where no row is left.
    """
    return _prompts(path, on_bad_line)


def prompts_from_sequence(
    prompts: Iterable[Any], *, on_bad_line: OnBadLine = "error"
) -> tuple[list[PromptExample], SkippedLines]:
    """The same from Python: texts, lists of messages, dictionaries, or a `datasets.Dataset`."""
    rows = (row if isinstance(row, Mapping) else {"prompt": row} for row in prompts)
    return _prompts(rows, on_bad_line)


def limit_prompts(
    examples: Sequence[PromptExample],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    *,
    on_bad_line: OnBadLine = "error",
) -> tuple[list[PromptExample], SkippedLines]:
    """The prompts of 1 to `max_prompt_tokens` tokens; others are errors, or skipped and counted."""
    if any(not isinstance(example.prompt, str) for example in examples):
        require_chat_template(tokenizer)
    bad_lines = BadLines(on_bad_line)
    kept = []
    for example in examples:
        try:
            tokens = len(encode_prompt(tokenizer, example.prompt))
        except TemplateError as error:  # such as "roles must alternate"
            bad_lines.add(example.place, "refused by the model's chat template", f" ({error})")
            continue
        if tokens > max_prompt_tokens:
            bad_lines.add(
                example.place,
                "prompt too long",
                f": {tokens} tokens, more than data.max_prompt_tokens = {max_prompt_tokens}",
                "Raise data.max_prompt_tokens, shorten the prompt, or leave such prompts out with "
                "data.on_bad_line=skip.",
            )
        elif tokens == 0:
            bad_lines.add(example.place, "prompt has no tokens")
        else:
            kept.append(example)
    if not kept:
        raise UserError(f"No usable prompt is left: {bad_lines.skipped}.")
    return kept, bad_lines.skipped


def columns_of(examples: Sequence[PromptExample]) -> dict[str, list[Any]]:
    """The other columns of the data as lists; one that some rows lack holds None there."""
    names = {name for example in examples for name in example.columns}
    return {name: [example.columns.get(name) for example in examples] for name in sorted(names)}


def load_preferences(
    source: str | Path | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    on_bad_line: OnBadLine = "error",
) -> tuple[list[Preference], SkippedLines]:
    """Preference pairs of a file or a sequence of rows, in any of these forms:

    - `chosen`, `rejected`: responses as text, with their `prompt` (text or chat messages);
    - the same without `prompt`: whole texts, whose common start is the prompt;
    - chat messages, the last one the assistant's, all before it shared;
    - HH-RLHF dialogues (`\\n\\nHuman: …\\n\\nAssistant: …`), which become chat messages where
      `tokenizer` has a chat template;
    - each with an optional finite `margin`;
    - `prompt`, `responses`, `ranks` (lower is better, equal ranks no pair, negative ones absent),
      expanded to all ordered pairs;
    - records that Argilla or Label Studio exported: see `annotations`.

    Raises `UserError` for a row that fits none, or skips it, and where no pair is left.
    """
    bad_lines = BadLines(on_bad_line)
    pairs: list[Preference] = []
    for place, row in ordinary_rows(read_rows(source, "preferences", bad_lines), bad_lines):
        try:
            found = _pairs_of(row, bool(tokenizer.chat_template))
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        if not found:  # no mistake: people do find all responses equally good
            bad_lines.skipped.add(place, "no two responses with different ranks")
        pairs.extend(found)
    if not pairs:
        raise UserError(f"No usable preference pair in {_name(source)}: {bad_lines.skipped}.")
    if any(not isinstance(pair.prompt, str) for pair in pairs):
        require_chat_template(tokenizer)
    return pairs, bad_lines.skipped


def split_preferences(
    pairs: Sequence[Preference], fraction: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """`(training, held out)`, about `fraction` of the pairs held out, by prompt and repeatably.

    Pairs of one prompt never stand on both sides: the held-out accuracy would flatter otherwise.
    """
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        # Pairs without a prompt have nothing in common.
        key = json.dumps(pair.prompt) if pair.prompt else f"no prompt {index}"
        groups.setdefault(key, []).append(index)
    if fraction == 0:
        return list(pairs), []
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    target = max(1, round(fraction * len(pairs)))
    held_out: set[int] = set()
    for group in shuffled:
        if len(held_out) + len(group) <= target:
            held_out.update(group)
    if not held_out:
        smallest = min(shuffled, key=len)
        held_out.update(smallest)
    if len(held_out) == len(pairs):
        raise UserError(
            f"{len(pairs)} preference pairs over {len(groups)} prompts are too few to hold some "
            "out: give more data, data.eval_path, or data.eval_fraction=0."
        )
    training = [pair for index, pair in enumerate(pairs) if index not in held_out]
    return training, [pairs[index] for index in sorted(held_out)]


def _prompts(
    source: str | Path | Iterable[Any], on_bad_line: OnBadLine
) -> tuple[list[PromptExample], SkippedLines]:
    bad_lines = BadLines(on_bad_line)
    examples = []
    for place, row in read_rows(source, "prompts", bad_lines):
        try:
            prompt = _check_prompt(_column(row, "prompt"))
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        columns = {name: value for name, value in row.items() if name != "prompt"}
        examples.append(PromptExample(prompt, columns, place))
    if not examples:
        raise UserError(f"No usable prompt in {_name(source)}: {bad_lines.skipped}.")
    return examples, bad_lines.skipped


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        there = ", ".join(repr(str(key)) for key in row) or "none"
        raise BadLineError(f"no column {name!r}", f" (columns: {there})")
    return row[name]


def _check_prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        text = _check_text(prompt, "prompt")
        if not text.strip():
            raise BadLineError("empty prompt")
        return text
    messages = _check_messages(prompt, "prompt")
    if messages[-1]["role"] == "assistant":
        raise BadLineError("the prompt's last message is the assistant's, not one to answer")
    if not messages[-1]["content"].strip():
        raise BadLineError("empty prompt", " (its last message)")
    return messages


def _check_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise BadLineError(f"{name!r} must be text", f", not {_kind(text)}")
    if has_lone_surrogate(text):
        raise BadLineError(f"lone surrogate in {name!r} (half of an emoji or the like)")
    return text


def _check_messages(messages: Any, name: str) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadLineError(f"{name!r} must be text or chat messages", f", not {_kind(messages)}")
    if not messages:
        raise BadLineError(f"{name!r} is an empty list of messages")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadLineError(
                f"{name!r} has a message without 'role' and 'content'", f" (message {index})"
            )
        role = _check_text(message["role"], f"{name}.role")
        checked.append(
            {"role": role, "content": _check_text(message["content"], f"{name}.content")}
        )
    return checked


def _pairs_of(row: Any, chat: bool) -> list[Preference]:
    if not isinstance(row, Mapping):
        raise BadLineError("a preference must be a dictionary", f", not {_kind(row)}")
    if "responses" in row or "ranks" in row:
        return _ranked_pairs(row, chat)
    chosen, rejected = _column(row, "chosen"), _column(row, "rejected")
    prompt = _check_prompt(row["prompt"]) if row.get("prompt") is not None else None
    margin = _check_margin(row.get("margin"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = _check_text(chosen, "chosen"), _check_text(rejected, "rejected")
        if prompt is not None:
            prompt = _chat_if_dialogue(prompt, chat)
        elif _is_dialogue(chosen) and _is_dialogue(rejected):
            prompt, chosen, rejected = _split_dialogues(chosen, rejected, chat)
        else:
            prompt, chosen, rejected = _split_texts(chosen, rejected)
    else:
        prompt, chosen, rejected = _split_messages(
            prompt, _check_messages(chosen, "chosen"), _check_messages(rejected, "rejected")
        )
    if chosen == rejected:
        raise BadLineError("chosen and rejected are the same")
    return [Preference(prompt, chosen, rejected, margin)]


def _ranked_pairs(row: Mapping[str, Any], chat: bool) -> list[Preference]:
    prompt = _chat_if_dialogue(_check_prompt(_column(row, "prompt")), chat)
    responses, ranks = _column(row, "responses"), _column(row, "ranks")
    for name, value in (("responses", responses), ("ranks", ranks)):
        if not isinstance(value, list | tuple):
            raise BadLineError(f"{name!r} must be a list", f", not {_kind(value)}")
    if len(responses) != len(ranks):
        raise BadLineError(
            "'responses' and 'ranks' differ in length", f" ({len(responses)} and {len(ranks)})"
        )
    for rank in ranks:
        if not _is_number(rank):
            raise BadLineError("'ranks' must be numbers", f", not {rank!r}")
    present = [
        (rank, _check_text(response, "responses"))
        for rank, response in zip(ranks, responses, strict=True)
        if rank >= 0
    ]
    present.sort(key=lambda item: item[0])
    pairs = []
    for index, (rank, better) in enumerate(present):
        for worse_rank, worse in present[index + 1 :]:
            if worse_rank == rank:
                continue
            if better == worse:
                raise BadLineError("chosen and rejected are the same", " (two ranked responses)")
            pairs.append(Preference(prompt, better, worse))
    return pairs


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
    """The common start is the prompt, cut before the last space in it: words stay whole."""
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
    return _chat_if_dialogue(prompt, chat), better, worse


def _chat_if_dialogue(prompt: Prompt, chat: bool) -> Prompt:
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
    if not _is_number(margin):
        raise BadLineError("'margin' must be a finite number", f", not {margin!r}")
    return float(margin)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the sequence that was given"

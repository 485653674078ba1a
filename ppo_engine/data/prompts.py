"""Prompts: every accepted form in, one checked form out.

A line that cannot be used is an error naming `file:line`, or is counted and reported where
`on_bad_line="skip"`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_engine.data.columns import Columns, name_of
from ppo_engine.data.forms import (
    ChatRules,
    check_prompt,
    complete_prompt,
    take_prompt,
)
from ppo_engine.data.renaming import renamed_rows
from ppo_engine.data.rows import BadLineError, BadLines, OnBadLine, SkippedLines, read_rows, rows_of
from ppo_engine.data.unseen import remark_unseen
from ppo_engine.errors import UserError
from ppo_engine.text.options import OPTION_COLUMNS, as_columns, from_columns
from ppo_engine.text.prompt import Prompt
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import TemplateError


@dataclass(frozen=True)
class PromptExample:
    """A prompt, the other columns of its row (for the reward function), its place in the data."""

    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What its columns hand to the chat template."""
        return from_columns(self.columns)


def load_prompts(
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    on_bad_line: OnBadLine = "error",
    as_chat: bool = False,
    columns: Mapping[str, str] | None = None,
    system_prompt: str = "",
) -> tuple[list[PromptExample], SkippedLines]:
    """Prompts of a JSONL or parquet file or a saved data set.

    `forms` names the columns that a prompt is made of. It is text, which `as_chat` makes a user's
    message, an HH-RLHF dialogue or chat messages; of a whole conversation (`messages`, …) the
    answer at its end is left out, and noted. Every column but `prompt` is kept, with `tools` and
    `chat_template_kwargs` as the chat template takes them. `columns` and `system_prompt` are those
    of the settings (`data.columns`, `data.system_prompt`). Raises `UserError` for a row without a
    usable prompt, or skips it, and if no row is left.
    """
    return _prompts(path, tokenizer, on_bad_line, as_chat, columns or {}, system_prompt)


def prompts_from_sequence(
    prompts: Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    on_bad_line: OnBadLine = "error",
    as_chat: bool = False,
    columns: Mapping[str, str] | None = None,
    system_prompt: str = "",
) -> tuple[list[PromptExample], SkippedLines]:
    """The same from Python: texts, lists of messages, dictionaries, or a `datasets.Dataset`."""
    rows = (
        row if isinstance(row, Mapping) else {"prompt": row} for row in rows_of(prompts, "prompts")
    )
    return _prompts(rows, tokenizer, on_bad_line, as_chat, columns or {}, system_prompt)


def limit_prompts(
    examples: Sequence[PromptExample],
    renderer: Renderer,
    max_prompt_tokens: int,
    *,
    room: int = sys.maxsize,
    on_bad_line: OnBadLine = "error",
) -> tuple[list[PromptExample], SkippedLines]:
    """The prompts of 1 to `max_prompt_tokens` tokens; others are errors, or skipped and counted.

    `room` is how many tokens the model's context leaves for a prompt, besides its response.
    """
    if any(not isinstance(example.prompt, str) for example in examples):
        renderer.template.require()
    bad_lines = BadLines(on_bad_line)
    kept = []
    for example in examples:
        try:
            tokens = len(renderer.prompt(example.prompt, example.options))
            remark_unseen(bad_lines, renderer.template, example.prompt, example.options)
        except TemplateError as error:  # such as "roles must alternate"
            bad_lines.add(example.place, error.reason, error.detail)
            continue
        if tokens > min(max_prompt_tokens, room):
            whose, remedy = (
                ("data.max_prompt_tokens", "Raise data.max_prompt_tokens")
                if max_prompt_tokens <= room
                else ("the context left", "Lower generation.max_new_tokens")
            )
            bad_lines.add(
                example.place,
                "prompt too long",
                f": {tokens} tokens, more than {whose} = {min(max_prompt_tokens, room)}",
                f"{remedy}, shorten the prompt, or skip such prompts with data.on_bad_line=skip.",
            )
        elif tokens == 0:
            bad_lines.add(example.place, "prompt has no tokens")
        else:
            kept.append(example)
    if not kept:
        raise UserError(f"No usable prompt is left: {bad_lines.skipped}.")
    return kept, bad_lines.skipped


def columns_of(examples: Sequence[PromptExample]) -> dict[str, list[Any]]:
    """The other columns of the data as lists; None where a row lacks one."""
    names = column_names(examples)
    return {name: [example.columns.get(name) for example in examples] for name in names}


def column_names(examples: Iterable[PromptExample]) -> list[str]:
    """The names of the other columns of the data, in order."""
    return sorted({name for example in examples for name in example.columns})


def _prompts(
    source: str | Path | Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    on_bad_line: OnBadLine,
    as_chat: bool,
    names: Mapping[str, str],
    system_prompt: str,
) -> tuple[list[PromptExample], SkippedLines]:
    rules = ChatRules.of(tokenizer, as_chat, system_prompt)
    bad_lines = BadLines(on_bad_line)
    examples = []
    rows = read_rows(source, "prompts", bad_lines)
    for place, row in renamed_rows(rows, names, bad_lines):
        try:
            columns = Columns(row)
            name, whole = take_prompt(columns)
            asked = whole if name == "prompt" else _before_answer(whole)
            prompt, options = complete_prompt(check_prompt(asked), columns, rules)
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        if asked != whole:
            bad_lines.skipped.remarks["the assistant's answer at a conversation's end is cut"] += 1
        bad_lines.skipped.unread.update(columns.left)
        kept = {key: value for key, value in row.items() if key not in ("prompt", *OPTION_COLUMNS)}
        examples.append(PromptExample(prompt, kept | as_columns(options), place))
    if not examples:
        raise UserError(f"No usable prompt in {name_of(source)}: {bad_lines.skipped}.")
    return examples, bad_lines.skipped


def _before_answer(prompt: Prompt) -> Prompt:
    """A conversation without the assistant's messages at its end."""
    if isinstance(prompt, str):
        return prompt
    asked = [index for index, turn in enumerate(prompt) if turn["role"] != "assistant"]
    if not asked:
        raise BadLineError("no message but the assistant's: there is nothing to answer")
    return prompt[: asked[-1] + 1]

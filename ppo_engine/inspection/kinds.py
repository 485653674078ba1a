"""What a file of rows can be: examples, preferences or prompts; and which of them it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ppo_engine.data.demonstrations import load_demonstrations
from ppo_engine.data.forms import reading
from ppo_engine.data.preferences import load_preferences
from ppo_engine.data.prompts import prompts_from_sequence
from ppo_engine.data.rows import BadLines, read_rows
from ppo_engine.errors import UserError
from ppo_engine.inspection.rows import (
    Inspection,
    Model,
    inspect_examples,
    inspect_preferences,
    inspect_prompts,
)

_GUESSED_FROM = 20  # rows


@dataclass(frozen=True)
class Kind:
    """One kind of rows: the command that takes them, and how they are read and shown."""

    command: str
    unit: str
    marks: str  # what marked tokens are
    load: Callable[..., tuple[list[Any], Any]]
    inspect: Callable[[Any, Model, int], Inspection]


# In the order in which they are guessed: what is a preference has a prompt, too.
KINDS: Mapping[str, Kind] = {
    "preferences": Kind(
        "reward",
        "preferences",
        "where the score is read",
        load_preferences,
        inspect_preferences,
    ),
    "sft": Kind(
        "sft",
        "examples",
        "learned",
        load_demonstrations,
        inspect_examples,
    ),
    "prompts": Kind(
        "ppo",
        "prompts",
        "",
        prompts_from_sequence,
        inspect_prompts,
    ),
}


def guess(path: str | Path, model: Model, configs: Mapping[str, Any]) -> str:
    """Of the kinds that `configs` has settings for, the first that takes more than half of a file's
    first rows, else the one that takes most; a UserError where none takes any."""
    bad_lines = BadLines("skip")
    rows = [row for _, row in islice(read_rows(path, "rows", bad_lines), _GUESSED_FROM)]
    if not rows:
        raise UserError(f"No usable row in {path}: {bad_lines.skipped}.")
    taken, problems = {}, []
    for name, config in configs.items():
        options = {**reading(config.data), "as_chat": False}  # what a row is does not change
        try:
            found, _ = KINDS[name].load(
                rows, tokenizer=model.tokenizer, on_bad_line="skip", **options
            )
            taken[name] = len(found)
        except UserError as error:
            problems.append(f"  - as {name}: {error}")
    if not taken:
        raise UserError("\n".join([f"No command takes the rows of {path}:", *problems]))
    return max(taken, key=lambda name: min(2 * taken[name], len(rows) + 1))

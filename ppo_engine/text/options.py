"""What a row hands to the chat template, its options: `tools`, and template arguments of its own.

Columns hold them, so that they travel with the prompts of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEMPLATE_ARGUMENTS = "chat_template_kwargs"
OPTION_COLUMNS = ("tools", TEMPLATE_ARGUMENTS)


def as_columns(options: Mapping[str, Any]) -> dict[str, Any]:
    """A row's options as its columns."""
    arguments = {name: value for name, value in options.items() if name != "tools"}
    tools = {"tools": options["tools"]} if "tools" in options else {}
    return {**tools, **({TEMPLATE_ARGUMENTS: arguments} if arguments else {})}


def from_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a row's columns hold."""
    tools, own = map(row.get, OPTION_COLUMNS)
    return {**({"tools": tools} if tools else {}), **(own or {})}


def row_options(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """Those of row number `row` of a batch."""
    return from_columns({name: columns[name][row] for name in OPTION_COLUMNS if name in columns})

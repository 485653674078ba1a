"""The columns of a row, by name, and what one may hold: text or numbers; else a `BadLineError`."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_engine.data.rows import BadLineError, has_lone_surrogate


class Columns:
    """A row's columns, where null is as good as absent; it remembers which were taken."""

    def __init__(self, row: Any) -> None:
        if not isinstance(row, Mapping):
            raise BadLineError("a row must be a dictionary", f", not {kind(row)}")
        try:
            self.row = {key: _plain(value) for key, value in row.items()}
        except RecursionError:
            raise BadLineError("nested too deeply") from None
        self.taken: set[str] = set()

    def find(self, names: Sequence[str]) -> str | None:
        """The first of `names` whose column is not null."""
        return next((name for name in names if not _is_null(self.row.get(name))), None)

    def take(self, name: str) -> Any:
        """The column `name`; None where it is not there."""
        self.taken.add(name)
        return self.row.get(name)

    def take_first(self, names: Sequence[str], hint: str = "") -> tuple[str, Any]:
        """Name and content of the first of `names` that is there, best one that is not null; a
        `BadLineError` without any, which ends with `hint` and how to name another column."""
        name = self.find(names) or next((name for name in names if name in self.row), None)
        if name is None:
            there = ", ".join(repr(str(key)) for key in self.row) or "none"
            detail = f" (columns: {there}){hint}; {self._renaming(names)}"
            raise BadLineError(f"no column {names[0]!r}", detail)
        return name, self.take(name)

    def _renaming(self, names: Sequence[str]) -> str:
        """The setting that reads another column as the first of `names`: the one whose name is
        nearest to any of them, if one is near."""
        free = [str(name) for name in self.row if name not in self.taken]
        near = (difflib.get_close_matches(name, free, n=1) for name in names)
        meant = next((found[0] for found in near if found), None)
        if meant is None:
            return f"a column of another name: data.columns={{{names[0]}: NAME}}"
        return f"if {meant!r} is it: data.columns={{{names[0]}: {meant}}}"

    @property
    def left(self) -> list[str]:
        """The columns that hold something and were not taken."""
        return [
            str(name)
            for name, value in self.row.items()
            if name not in self.taken and not is_blank(value)
        ]


def _plain(value: Any) -> Any:
    """Without the arrays and numbers of NumPy or torch that rows of DataFrames have."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_null(value: Any) -> bool:
    """A NaN is, with which a DataFrame fills what is not there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise BadLineError(f"{name!r} must be text", f", not {kind(text)}")
    if has_lone_surrogate(text):
        raise BadLineError(f"lone surrogate in {name!r} (half of an emoji or the like)")
    return text


def is_blank(value: Any) -> bool:
    """Whether it is null, or nothing but white space, or has no items."""
    value = value.strip() if isinstance(value, str) else value
    return _is_null(value) or (isinstance(value, str | list | tuple | dict) and not value)


def is_number(value: Any) -> bool:
    """Whether it is a finite one that a float holds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def name_of(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the sequence that was given"

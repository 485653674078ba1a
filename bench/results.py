"""Results as CSV files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COMMENT = "# "

Row = dict[str, Any]


def write_csv(path: str | Path, command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """`rows` under the `command` that made them, a comment in the first line; written atomically.

    None is an empty cell.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    text.write(f"{_COMMENT}{command}\n")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text.getvalue(), encoding="utf-8")
    os.replace(unfinished, path)


def read_csv(path: str | Path) -> tuple[str, list[dict[str, str]]]:
    """The command, and the rows."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix(_COMMENT), list(csv.DictReader(lines[1:]))


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value

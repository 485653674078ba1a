"""Columns of a file under the names that are read here: `data.columns`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ppo_engine.data.rows import BadLines
from ppo_engine.errors import UserError
from ppo_engine.messages import did_you_mean


def renamed_rows(
    rows: Iterable[tuple[str, Any]],
    columns: Mapping[str, str],
    bad_lines: BadLines,
    known: Collection[str] | None = None,
) -> Iterator[tuple[str, Any]]:
    """`(place, row)` again, with each row's column `columns[name]` under that `name` alone.

    A row that lacks such a column (null is enough) is a bad line; a name that is none of the
    `known` ones a UserError. Without these any will do: reward functions ask for columns by name.
    """
    for name in columns:
        if known is not None and name not in known:
            raise UserError(
                f"data.columns: nothing reads a column {name!r}.{did_you_mean(name, known)} Write "
                "{name that is read: name in the file}, such as {prompt: question}."
            )
    moved = {*columns.values()}
    for place, row in rows:
        if not columns or not isinstance(row, Mapping):
            yield place, row
            continue
        absent = next((name for name, source in columns.items() if source not in row), None)
        if absent is not None:
            there = ", ".join(repr(str(key)) for key in row) or "none"
            bad_lines.add(
                place,
                f"no column {columns[absent]!r}, of which data.columns makes {absent!r}",
                f" (columns: {there})",
                did_you_mean(columns[absent], map(str, row)).strip(),
            )
            continue
        replaced = sorted({*columns} & {*row} - moved)
        for name in replaced:
            remark = f"{columns[name]!r} takes the place of the column {name!r} (data.columns)"
            bad_lines.skipped.remarks[remark] += 1
        kept = {name: value for name, value in row.items() if name not in moved}
        yield place, kept | {name: row[source] for name, source in columns.items()}

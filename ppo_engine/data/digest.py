"""What a run was made of, in a line: how many rows, and a digest of them.

Of rows as they were read and checked, never of what a template or a tokenizer makes of them: the
date in a template is another one tomorrow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_engine.messages import counted

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe_rows(rows: Sequence[Any]) -> str:
    """Such as "8 rows, digest 1f0c…": the same for equal rows (dataclasses) in the same order,
    columns included, wherever they were read from."""
    digest = hashlib.sha256()
    for row in rows:
        names = (field.name for field in dataclasses.fields(row) if field.name != "place")
        values = {name: getattr(row, name) for name in names}
        digest.update(json.dumps(values, default=_plain, skipkeys=True).encode() + b"\n")
    return f"{counted(len(rows), 'row')}, digest {digest.hexdigest()[:16]}"


def changed_data(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each part of the data whose description is another one."""
    names = dict.fromkeys([*then, *now])
    return [
        f"{name}: {then.get(name, 'nothing')} then, {now.get(name, 'nothing')} now"
        for name in names
        if then.get(name) != now.get(name)
    ]


def _plain(value: Any) -> Any:
    """A value that JSON does not have, as a row from Python or parquet may hold it."""
    if hasattr(value, "tolist"):  # NumPy's and torch's
        return value.tolist()
    return _ADDRESS.sub("", repr(value))  # which is not the object's content

"""What a planted bug is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Bug(NamedTuple):
    """A bug in a file: `old` becomes `new`."""

    name: str
    old: str
    new: str
    tests: str = ""  # names of test files; empty: those of the file
    excuse: str = ""  # why it survives: it changes nothing, or no test is worth it


class InFile(NamedTuple):
    """The bugs of a file."""

    path: str
    tests: str  # names of the test files that could see them, the likeliest first
    bugs: list[Bug]


@dataclass(frozen=True)
class Fault:
    """A bug with its file and its tests."""

    file: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    excuse: str

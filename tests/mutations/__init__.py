"""Bugs to be planted in `ppo_engine`, one at a time; `mutants.py` plants them.

They stand in the `.txt` files of this folder, by what they break, and are read like a patch:

    === path of the file, from the repository's root
    @ names of the test files that could see its bugs, the likeliest first

    what the bug is, in words
    @ other tests, where those of the file are not meant
    ! where it is not caught: why it changes nothing, or why no test is worth it
    - the text, which stands exactly once in the file (parts of lines, too)
    + what takes its place; nothing at all where it is taken out

A line that begins with `#` is a comment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """A bug: in `file`, the text `old` becomes `new`."""

    name: str
    file: str = ""
    tests: tuple[str, ...] = ()
    excuse: str = ""  # why it survives
    old: str = ""
    new: str = ""


def read_mutations(text: str) -> Iterator[Mutation]:
    """The bugs of a file of this folder."""
    of_file = Mutation("")
    for block in text.split("\n\n"):
        parts: dict[str, list[str]] = {"": [], "=": [], "@": [], "!": [], "-": [], "+": []}
        for line in block.splitlines():
            mark = line.partition(" ")[0]
            if mark == "===":
                parts["="].append(line[4:])
            elif mark in parts and mark:
                parts[mark].append(line[2:])
            elif line and not line.startswith("# "):
                parts[""].append(line)
        found = replace(of_file, excuse=" ".join(parts["!"]))
        if parts["@"]:
            found = replace(found, tests=tuple(" ".join(parts["@"]).split()))
        if parts["="]:
            assert not parts[""], f"a blank line is missing before === {parts['='][0]}"
            of_file = replace(found, file=parts["="][0])
        elif parts[""]:
            old, new = "\n".join(parts["-"]), "\n".join(parts["+"])
            yield replace(found, name=" ".join(parts[""]), old=old, new=new)


MUTATIONS = [
    mutation
    for file in sorted(Path(__file__).parent.glob("*.txt"))
    for mutation in read_mutations(file.read_text(encoding="utf-8"))
]

"""A file of JSON lines that are made a batch at a time, and are not lost when making them fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import counted, unwritten
from ppo_engine.sealed import sync
from ppo_engine.settings.files import changed_settings

Row = dict[str, Any]


def as_line(row: Mapping[str, Any]) -> str:
    """A line of JSON; a number that is not finite becomes null, as JSON has no NaN."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    if "NaN" in text or "Infinity" in text:  # or a text has these words
        strict = json.loads(text, parse_constant=lambda _: None)
        text = json.dumps(strict, ensure_ascii=False)
    return text + "\n"


def check_place(name: str, *, resume: bool) -> None:
    """Raises a UserError where the file is there already, and, unless it is to be resumed, where
    the rows of a command that failed are."""
    path, partial = _paths(name)
    if path.exists():
        done = ", and is complete: nothing is left to be made" * resume
        raise UserError(f"{name} exists{done}; remove it or choose another --out.")
    if not resume and partial.exists():
        raise UserError(
            f"{partial} has rows of a command that failed: go on from there with --resume, or "
            "remove it."
        )
    parent = path.absolute().parent
    if parent.exists() and not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"{name} cannot be written: {parent} is not a folder to write to.")


def _paths(name: str) -> tuple[Path, Path]:
    """Of the file, and of what it is until it is complete."""
    path = Path(name).expanduser()
    return path, path.with_name(f"{path.name}.partial")


class RowFile:
    """The file is called `NAME.partial` until its last row is there.

    Beside it, `NAME.partial.json` says what the rows are made of: only the same command goes on
    with them.
    """

    def __init__(
        self, name: str, settings: Mapping[str, Any], free: Iterable[str], *, resume: bool
    ) -> None:
        """`settings`, nested, say what the rows are, but for the `free` keys.

        Raises a UserError, before any work, where the file is there already, and where there is
        nothing to `resume`, or something that was made with other settings.
        """
        check_place(name, resume=resume)
        self.path, self.partial = _paths(name)
        self._about = self.path.with_name(f"{self.path.name}.partial.json")
        self.settings = dict(settings)  # with which the first of the rows were made
        self._resumed: dict[str, Any] = {}
        self.rows: list[Row] = []  # those that were there before
        if resume:
            self._resumed = self._read_about()
            changed = changed_settings(self._resumed["settings"], settings, free)
            if changed:
                raise UserError(
                    f"{self.partial} was made with other settings; go on with the same ones, or "
                    "remove it:\n" + "\n".join(f"  - {line}" for line in changed)
                )
            self.settings = self._resumed["settings"]

    @contextmanager
    def open(self, data: str, batch: int) -> Iterator[Callable[[list[Row]], None]]:
        """What appends rows; `self.rows` are there already, whole batches of `batch` rows.

        `data` describes what the rows are made of (`describe_rows`). Where the block fails, the
        exception's notes say what is kept.
        """
        if self._resumed and self._resumed["data"] != data:
            raise UserError(
                f"{self.partial} was made of other prompts ({self._resumed['data']}, and now "
                f"{data}): go on with the same ones, or remove it."
            )
        try:
            written = self._take_up(batch) if self._resumed else self._begin(data)
            file = open(self.partial, "r+b", buffering=0)  # noqa: SIM115  closed below
        except OSError as error:
            raise unwritten(str(self.path), error) from error
        count = len(self.rows)

        def append(rows: list[Row]) -> None:
            nonlocal count
            left = memoryview("".join(map(as_line, rows)).encode())
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                raise unwritten(str(self.partial), error) from error
            count += len(rows)

        try:
            with file:
                file.truncate(written)
                file.seek(written)
                yield append
                os.fsync(file.fileno())
        except BaseException as error:
            if count:
                error.add_note(
                    f"{counted(count, 'row')} in {self.partial}: the same command with --resume "
                    "goes on from there."
                )
            else:
                self.partial.unlink(missing_ok=True)
                self._about.unlink(missing_ok=True)
            raise
        os.replace(self.partial, self.path)
        sync(self.path.parent)
        self._about.unlink(missing_ok=True)

    def _begin(self, data: str) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._about.write_text(
            json.dumps({"settings": self.settings, "data": data}), encoding="utf-8"
        )
        self.partial.touch()
        return 0

    def _take_up(self, batch: int) -> int:
        """Read the rows that are there; returns their bytes, without those of a batch that was
        left unfinished."""
        lines = self.partial.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
        lines = lines[: len(lines) // batch * batch]
        self.rows = [json.loads(line) for line in lines]
        return sum(len(line) + 1 for line in lines)

    def _read_about(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._about.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if not self.partial.exists() or not {"settings", "data"} <= found.keys():
            raise UserError(
                f"There is nothing to go on with: {self.partial} or {self._about.name} is missing "
                "or damaged. Remove them, and leave out --resume."
            )
        return found

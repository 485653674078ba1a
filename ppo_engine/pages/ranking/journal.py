"""Decisions on the disk, from the moment in which they are made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from ppo_engine.data.rows import BadLineError, read_jsonl
from ppo_engine.errors import MachineError, UserError
from ppo_engine.pages.ranking.decision import Decision, decision_of
from ppo_engine.run.directory import write_atomically
from ppo_engine.run.row_file import as_line
from ppo_engine.sealed import sync


class Journal:
    """A file of rows, for each person and candidate one, that is whole at every moment.

    A first decision is appended, and on the disk when `put` returns. One that replaces another, or
    is taken back, has the file written anew beside it and renamed. So the file is its own journal:
    whatever is killed when, it holds every decision that was answered, once, and `ppo-engine reward
    --data` can read it. (A journal apart, from which the output is made, would add moments in which
    the two differ.) At most the last line is torn, of a decision that nobody was told is kept: it
    is cut off here.
    """

    def __init__(self, path: Path) -> None:
        """Raises a UserError for a file that has other rows."""
        self.path = path
        self._rows: dict[tuple[str, str], Decision] = {}
        self._size = 0
        with self._told():
            if path.exists():
                content = path.read_bytes()
                # Before anything is cut off: it may be a file of something else.
                for number, row in islice(read_jsonl(path), content.count(b"\n")):
                    self._keep(row, f"{path}:{number}")
                self._mend(content[content.rfind(b"\n") + 1 :])
                self._size = path.stat().st_size

    def get(self, annotator: str, key: str) -> Decision | None:
        return self._rows.get((annotator, key))

    def all(self) -> Iterable[Decision]:
        """In the order of the file."""
        return self._rows.values()

    def put(self, decision: Decision) -> None:
        """Keep it, in the place of what this person decided before about the same candidate."""
        if decision.key in self._rows:
            self._rewrite(self._rows | {decision.key: decision})
        else:
            self._append(as_line(decision.row()).encode())
            self._rows[decision.key] = decision

    def remove(self, decision: Decision) -> None:
        self._rewrite({key: kept for key, kept in self._rows.items() if key != decision.key})

    def _keep(self, row: object, place: str) -> None:
        try:
            decision = decision_of(row, place)
        except BadLineError as error:
            raise _no_rankings(place, error) from None
        self._rows[decision.key] = decision

    def _mend(self, last: bytes) -> None:
        """Cut off what a crash left of the `last` line; one that lacks nothing but its end gets
        it."""
        if not last:
            return
        place = f"{self.path}, its last line"
        try:
            row = json.loads(last)
        except (ValueError, RecursionError):
            if not last.startswith(b"{"):
                raise _no_rankings(place, "not valid JSON") from None
            os.truncate(self.path, self.path.stat().st_size - len(last))
        else:
            self._keep(row, place)
            with open(self.path, "ab") as file:
                file.write(b"\n")
        sync(self.path)

    def _append(self, line: bytes) -> None:
        with self._told(), open(self.path, "ab", buffering=0) as file:
            self._check_unchanged(file.tell())
            left = memoryview(line)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(self._size)
                raise
            if not self._size:
                sync(self.path.parent)
            self._size += len(line)

    def _rewrite(self, rows: dict[tuple[str, str], Decision]) -> None:
        text = "".join(as_line(decision.row()) for decision in rows.values())
        with self._told():
            self._check_unchanged(self.path.stat().st_size)
            write_atomically(self.path, text)
        self._rows, self._size = rows, len(text.encode())

    def _check_unchanged(self, size: int) -> None:
        if size != self._size:
            raise UserError(
                f"Not kept: another program has changed {self.path} since this one read it. End "
                "this one and start it again."
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineError(f"{self.path} cannot be written: {error.strerror}.") from error


def _no_rankings(place: str, why: object) -> UserError:
    return UserError(f"{place}: {why}. Fix it, or choose another --out: this one is gone on with.")

"""What stands on a terminal, of what was written to it."""

from __future__ import annotations

import io
import re

import pytest

_TOKEN = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([^\x1b])", re.DOTALL)


class Terminal(io.StringIO):
    """A stream that says it is a terminal of 100 columns."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """The lines as they stand at the end, without those that are blank."""
        lines, row, column = [""], 0, 0
        for codes, command, char in _TOKEN.findall(self.getvalue()):
            if command == "A":
                row -= int(codes or 1)
            elif command == "K":
                lines[row] = ""
            elif char == "\n":
                row, column = row + 1, 0
                lines += [""] * (row == len(lines))
            elif char == "\r":
                column = 0
            elif char:
                lines[row] = lines[row].ljust(column)[:column] + char + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines if line.strip()]


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal that is standard output and standard error from here on."""
    stream = Terminal()
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("LINES", "40")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    return stream

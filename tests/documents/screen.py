"""What a terminal shows in the end of what was written to it, its history included."""

from __future__ import annotations

import re

_PART = re.compile(
    r"\x1b\[(?P<numbers>[?\d;]*)(?P<letter>[A-Za-z])"  # a control sequence
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # a title or a link
    r"|(?P<one>[\r\n\x08])|(?P<text>[^\x1b\r\n\x08]+)|\x1b"
)


def screen(written: str, columns: int = 100) -> str:
    """The lines that are left: returns, cursor movements and erasures have been carried out.

    Lines that are longer than the terminal go on in the next, and are one again when they are
    copied, as there. Colors are dropped.
    """
    lines: list[list[str]] = [[]]
    further: set[int] = set()  # lines that go on with the one above
    row = column = 0
    for part in _PART.finditer(written):
        if text := part["text"]:
            for character in text:
                if column == columns:
                    row, column = row + 1, 0
                    lines += [[] for _ in range(row + 1 - len(lines))]
                    further.add(row)
                line = lines[row]
                line += " " * (column - len(line))
                line[column : column + 1] = [character]
                column += 1
        elif part["one"] == "\n":
            row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
            further.discard(row)
        elif part["one"] == "\r":
            column = 0
        elif part["one"]:
            column = max(column - 1, 0)
        elif letter := part["letter"]:
            number = int(part["numbers"]) if part["numbers"].isdigit() else 0
            if letter == "A":
                row = max(row - max(number, 1), 0)
            elif letter == "B":
                row += max(number, 1)
                lines += [[] for _ in range(row + 1 - len(lines))]
            elif letter == "C":
                column += max(number, 1)
            elif letter == "D":
                column = max(column - max(number, 1), 0)
            elif letter == "G":
                column = max(number, 1) - 1
            elif letter == "K":
                del lines[row][0 if number == 2 else column :]
            elif letter == "J":
                del lines[row][column:], lines[row + 1 :]
    shown = ""
    for number, line in enumerate(lines):
        shown = shown if number in further else shown.rstrip(" ") + "\n" * (number > 0)
        shown += "".join(line)
    return shown.rstrip(" ")

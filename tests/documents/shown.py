"""Whether an output is what a page shows.

Words are compared in their order; spaces and line breaks do not count, so that a narrower terminal
changes nothing. Any number stands for any other, as seeds and machines differ, and `...` or `…` for
any text, none too. Everything else must be equal, from the first word to the last.
"""

from __future__ import annotations

import re

_NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?"
_PARTS = re.compile(rf"(?P<gap>\s*(?:\.\.\.+|…)\s*)|(?P<space>\s+)|(?P<number>{_NUMBER})|.", re.S)


def mismatch(shown: str, printed: str) -> str:
    """What of `shown` was not printed in its place; empty where all of it was."""
    shown, printed = shown.strip(), printed.strip()
    if re.fullmatch(_pattern(shown), printed, re.DOTALL):
        return ""
    lines = shown.splitlines()
    for count in range(1, len(lines) + 1):
        if not re.match(_pattern("\n".join(lines[:count])), printed, re.DOTALL):
            return f"the page shows {lines[count - 1].strip()!r}, which is not printed there"
    return f"more is printed than the page shows after {lines[-1].strip()!r}"


def _pattern(shown: str) -> str:
    made = []
    for part in _PARTS.finditer(shown):
        if part["gap"]:
            made.append(".*?")
        elif part["space"]:
            made.append(r"\s+")
        else:
            made.append(_NUMBER if part["number"] else re.escape(part[0]))
    return "".join(made)

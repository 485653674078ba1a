"""How values, counts and errors of libraries are worded in messages."""

from __future__ import annotations

from typing import Any


def shown(value: Any) -> str:
    """A value in an error message: its repr, shortened, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def counted(number: int, noun: str) -> str:
    """Such as "1 pair" and "3 pairs"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]

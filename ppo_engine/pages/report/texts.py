"""Texts of a run, which anybody may have written, as the page has them."""

from __future__ import annotations

from typing import Any

_LONGEST = 20_000  # characters of a text on the page


def shown_text(text: Any) -> str:
    """A text, its end left out where it is very long."""
    text = text if isinstance(text, str) else str(text)
    left = len(text) - _LONGEST
    return text if left <= 0 else f"{text[:_LONGEST]}… ({left:,} more characters)"


def shown_prompt(prompt: Any) -> list[dict[str, str]]:
    """The turns of a prompt: their `role`, empty for plain text, and `content`."""
    if not isinstance(prompt, list):
        return [{"role": "", "content": shown_text(prompt)}]
    turns = (turn if isinstance(turn, dict) else {"content": turn} for turn in prompt)
    return [
        {"role": str(turn.get("role", "")), "content": shown_text(turn.get("content", ""))}
        for turn in turns
    ]

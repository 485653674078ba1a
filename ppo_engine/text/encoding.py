"""What prompts are, and rows of token ids padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# {"role": …, "content": text}, and whatever else a chat template can render.
Message = dict[str, Any]
Prompt = str | list[Message]


def show_prompt(prompt: Prompt) -> str:
    """A prompt as a person reads it: its text, or its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Rows of one length, padded on the left, and the mask of real tokens."""
    width = max((len(row) for row in rows), default=0)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return ids, mask

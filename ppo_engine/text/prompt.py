"""What prompts are: text, or chat messages."""

from __future__ import annotations

from typing import Any, Protocol

# {"role": …, "content": text}, and whatever else a chat template can render.
Message = dict[str, Any]
Prompt = str | list[Message]


class HasPrompt(Protocol):
    """An example of any kind."""

    @property
    def prompt(self) -> Prompt: ...


def show_prompt(prompt: Prompt) -> str:
    """A prompt as a person reads it: its text, or its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])

"""What a column of a row may hold: text, chat messages, numbers; all else is a `BadLineError`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_engine.data.rows import BadLineError, has_lone_surrogate
from ppo_engine.text.encoding import Message, Prompt


def column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        there = ", ".join(repr(str(key)) for key in row) or "none"
        raise BadLineError(f"no column {name!r}", f" (columns: {there})")
    return row[name]


def check_prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        text = check_text(prompt, "prompt")
        if not text.strip():
            raise BadLineError("empty prompt")
        return text
    messages = check_messages(prompt, "prompt")
    if messages[-1]["role"] == "assistant":
        raise BadLineError("the prompt's last message is the assistant's, with nothing to answer")
    if not messages[-1]["content"].strip():
        raise BadLineError("empty prompt", " (its last message)")
    return messages


def check_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise BadLineError(f"{name!r} must be text", f", not {kind(text)}")
    if has_lone_surrogate(text):
        raise BadLineError(f"lone surrogate in {name!r} (half of an emoji or the like)")
    return text


def check_messages(messages: Any, name: str) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadLineError(f"{name!r} must be text or chat messages", f", not {kind(messages)}")
    if not messages:
        raise BadLineError(f"{name!r} is an empty list of messages")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadLineError(
                f"{name!r} has a message without 'role' and 'content'", f" (message {index})"
            )
        role = check_text(message["role"], f"{name}.role")
        checked.append({"role": role, "content": check_text(message["content"], f"{name}.content")})
    return checked


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def name_of(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the sequence that was given"

"""HH-RLHF dialogues: texts of turns, `\\n\\nHuman: …\\n\\nAssistant: …`, and as chat messages."""

from __future__ import annotations

import re
from typing import Any

from ppo_engine.data.rows import BadLineError
from ppo_engine.text.prompt import Message, Prompt

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ASSISTANT = "\n\nAssistant:"


def is_dialogue(text: str) -> bool:
    return text.startswith("\n\nHuman:") and _ASSISTANT in text


def chat_if_dialogue(prompt: str) -> Prompt:
    """A dialogue that the assistant is to go on with as chat messages, neighboring turns of one
    speaker joined; other text as it is."""
    if not (is_dialogue(prompt) and prompt.rstrip().endswith(_ASSISTANT)):
        return prompt
    parts = _TURN.split(prompt)[1:-2]  # the last turn is the one to be answered
    messages: list[Message] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def answer_to(prompt: object, response: Any, *, chat: bool) -> Any:
    """A response beside its `prompt`; to a dialogue that becomes a `chat` without the white space
    that follows "Assistant:" there."""
    if chat and isinstance(prompt, str) and isinstance(response, str):
        return response if isinstance(chat_if_dialogue(prompt), str) else response.strip()
    return response


def split_dialogues(chosen: str, rejected: str, chat: bool) -> tuple[Prompt, str, str]:
    """Everything up to the assistant's last turn is shared: prompt and responses, where `chat` as
    messages.

    In a few real dialogues the last turn is several `Assistant:` paragraphs in a row.
    """
    ends = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        start = text.find(_ASSISTANT, text.rfind("\n\nHuman:"))
        if start < 0:
            raise BadLineError(f"the last turn of {name!r} is not the assistant's")
        ends.append(start + len(_ASSISTANT))
    prompt = chosen[: ends[0]]
    if prompt != rejected[: ends[1]]:
        raise BadLineError("chosen and rejected do not share every turn but the last")
    responses = chosen[ends[0] :], rejected[ends[1] :]
    if not chat:
        return prompt, *responses
    better, worse = ("\n\n".join(part.strip() for part in t.split(_ASSISTANT)) for t in responses)
    return chat_if_dialogue(prompt), better, worse

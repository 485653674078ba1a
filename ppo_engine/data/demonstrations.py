"""Demonstrations (prompts with responses, or conversations): checked, then tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_engine.data.columns import check_messages, check_prompt, check_text, column, kind, name_of
from ppo_engine.data.preferences import chat_if_dialogue
from ppo_engine.data.rows import BadLineError, BadLines, OnBadLine, SkippedLines, read_rows
from ppo_engine.errors import UserError
from ppo_engine.text.encoding import Message, Prompt
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import ChatTemplate, TemplateError


@dataclass(frozen=True)
class Demonstration:
    """A prompt, the answer to learn, and its place in the data.

    Text is answered with text. Chat messages are followed by further ones, the first of them the
    assistant's; every assistant message among these is learned.
    """

    prompt: Prompt
    response: str | list[Message]
    place: str = ""


@dataclass(frozen=True)
class EncodedExample:
    """Token ids, and which of them are learned: never the first, which nothing predicts."""

    ids: list[int]
    trained: list[bool]
    group: int = 0  # index of its prompt

    def __len__(self) -> int:
        return len(self.ids)


def load_demonstrations(
    source: str | Path | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    on_bad_line: OnBadLine = "error",
) -> tuple[list[Demonstration], SkippedLines]:
    """Demonstrations of a file or a sequence of rows, in any of these forms:

    - `prompt` (text, chat messages or an HH-RLHF dialogue) and `response`, or `completion`: text,
      or chat messages;
    - chat `messages`, of which every assistant message is learned.

    Raises `UserError` for a row of another form, or skips it, and if no row is left.
    """
    bad_lines = BadLines(on_bad_line)
    found = []
    for place, row in read_rows(source, "demonstrations", bad_lines):
        try:
            prompt, response = _demonstration_of(row, bool(tokenizer.chat_template))
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        found.append(Demonstration(prompt, response, place))
    if not found:
        raise UserError(f"No usable example in {name_of(source)}: {bad_lines.skipped}.")
    if any(not isinstance(example.prompt, str) for example in found):
        ChatTemplate(tokenizer).require()
    return found, bad_lines.skipped


def encode_demonstration(renderer: Renderer, example: Demonstration) -> list[EncodedExample]:
    """An example as token ids; learned are the tokens of its responses and of what ends them. One
    for each answer where the chat template rewrites earlier ones.

    Raises `BadLineError` for a conversation that the template refuses.
    """
    try:
        encoded = renderer.learned(example.prompt, example.response)
    except TemplateError as error:  # such as "roles must alternate"
        raise BadLineError(error.reason, error.detail) from None
    return [EncodedExample(ids, [False, *trained[1:]]) for ids, trained in encoded]


def cut(example: EncodedExample, limit: int) -> EncodedExample:
    """Truncated to `limit` tokens: first at the start of the prompt, down to half of the limit,
    then at the end of what follows. So an answer is never learned without its question."""
    excess = max(0, len(example) - limit)
    start = min(excess, max(0, example.trained.index(True) - limit // 2))
    kept = slice(start, start + limit)
    return replace(example, ids=example.ids[kept], trained=[False, *example.trained[kept][1:]])


def _demonstration_of(row: Any, chat: bool) -> tuple[Prompt, str | list[Message]]:
    if not isinstance(row, Mapping):
        raise BadLineError("an example must be a dictionary", f", not {kind(row)}")
    if row.get("messages") is not None:
        messages = check_messages(row["messages"], "messages")
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise BadLineError("no message is the assistant's: there is nothing to learn")
        first = roles.index("assistant")
        if first == 0:
            raise BadLineError("the first message is the assistant's: it answers nothing")
        prompt: Prompt = check_prompt(messages[:first])
        response: Any = messages[first:]
    else:
        prompt = chat_if_dialogue(check_prompt(column(row, "prompt")), chat)
        name = "completion" if "response" not in row and "completion" in row else "response"
        response = column(row, name)
        if isinstance(response, str):
            response = check_text(response, name)
            if not isinstance(prompt, str):
                response = [{"role": "assistant", "content": response}]
        else:
            response = check_messages(response, name)
            if response[0]["role"] != "assistant":
                raise BadLineError(f"the first message of {name!r} is not the assistant's")
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
    answers = [response] if isinstance(response, str) else _answers(response)
    if not all(answer.strip() for answer in answers):
        raise BadLineError("empty response")
    return prompt, response


def _answers(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]

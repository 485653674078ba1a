"""Demonstrations (prompts with responses, or conversations): checked, then tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_engine.data.chat import check_messages, is_learned, is_silent
from ppo_engine.data.columns import Columns, check_text, name_of
from ppo_engine.data.dialogues import answer_to
from ppo_engine.data.forms import (
    ASKING,
    CHATS,
    PROMPTS,
    RESPONSES,
    ChatRules,
    check_prompt,
    complete_prompt,
    take_prompt,
)
from ppo_engine.data.renaming import renamed_rows
from ppo_engine.data.rows import BadLineError, BadLines, OnBadLine, SkippedLines, read_rows
from ppo_engine.data.split import prompt_groups
from ppo_engine.data.unseen import remark_unseen
from ppo_engine.errors import UserError
from ppo_engine.text.prompt import Message, Prompt
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import ChatTemplate, TemplateError


@dataclass(frozen=True)
class Demonstration:
    """A prompt, the answer to learn, and its place in the data.

    Text is answered with text. Chat messages are followed by further ones, the first of them the
    assistant's; of these, every assistant message without `train: false` is learned.
    """

    prompt: Prompt
    response: str | list[Message]
    place: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # tools and arguments for the template


@dataclass(frozen=True)
class EncodedExample:
    """Token ids, and which of them are learned: never the first, which nothing predicts."""

    ids: list[int]
    trained: list[bool]
    group: int = 0  # index of its prompt
    place: str = field(default="", repr=False)  # its row's in the data
    truncated: tuple[int, int] = field(default=(0, 0), repr=False)  # tokens: at the start, the end

    def __len__(self) -> int:
        return len(self.ids)


def load_demonstrations(
    source: str | Path | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    on_bad_line: OnBadLine = "error",
    as_chat: bool = False,
    columns: Mapping[str, str] | None = None,
    system_prompt: str = "",
) -> tuple[list[Demonstration], SkippedLines]:
    """Demonstrations of a file or a sequence of rows, in the columns that `forms` names:

    - a prompt (text, chat messages or an HH-RLHF dialogue) and a response: text, or chat messages;
    - `messages` or another conversation, of which every assistant message is learned, unless it
      is flagged.

    `as_chat` makes text a user's and the assistant's message; `columns` and `system_prompt` are
    those of the settings (`data.columns`, `data.system_prompt`).
    Raises `UserError` for a row of another form, or skips it, and if no row is left.
    """
    rules = ChatRules.of(tokenizer, as_chat, system_prompt)
    bad_lines = BadLines(on_bad_line)
    found = []
    rows = read_rows(source, "demonstrations", bad_lines)
    for place, row in renamed_rows(rows, columns or {}, bad_lines, (*ASKING, *RESPONSES)):
        try:
            there = Columns(row)
            example = _demonstration_of(there, rules)
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        bad_lines.skipped.unread.update(there.left)
        found.append(replace(example, place=place))
    if not found:
        raise UserError(f"No usable example in {name_of(source)}: {bad_lines.skipped}.")
    if any(not isinstance(example.prompt, str) for example in found):
        ChatTemplate(tokenizer).require()
    return found, bad_lines.skipped


def encode_demonstrations(
    renderer: Renderer,
    rows: Sequence[Demonstration],
    limit: int,
    *,
    name: str,
    on_bad_line: OnBadLine = "error",
) -> tuple[list[EncodedExample], SkippedLines, list[str]]:
    """The token ids of `rows`, truncated to `limit`; what was left out; and notes on what became
    of the others. `name` says which rows these are."""
    bad_lines = BadLines(on_bad_line)
    encoded: list[EncodedExample] = []
    apart = 0
    groups = {i: group for group, found in enumerate(prompt_groups(rows)) for i in found}
    for index, row in enumerate(rows):
        try:
            found = encode_demonstration(renderer, row)
            if not isinstance(row.response, str):
                chat = [*row.prompt, *row.response]
                remark_unseen(bad_lines, renderer.template, chat, row.options)
        except (BadLineError, TemplateError) as error:
            bad_lines.add(row.place, error.reason, error.detail)
            continue
        apart += len(found) > 1
        encoded += [replace(one, group=groups[index], place=row.place) for one in found]
    if rows and not encoded:
        raise UserError(f"No {name} example is left: {bad_lines.skipped}.")
    notes = []
    if apart:
        notes.append(
            f"{apart} {name} conversations become one example per answer: the chat template "
            "rewrites earlier answers."
        )
    long = sum(len(example) > limit for example in encoded)
    if long:
        notes.append(
            f"{long} of {len(encoded)} {name} examples were truncated to {limit} tokens "
            "(data.max_tokens, or the model's context)."
        )
    return [cut(example, limit) for example in encoded], bad_lines.skipped, notes


def encode_demonstration(renderer: Renderer, example: Demonstration) -> list[EncodedExample]:
    """An example as token ids; learned are the tokens of its responses and of what ends them. One
    for each answer where the chat template rewrites earlier ones. A conversation that the template
    refuses (such as "roles must alternate") is a `TemplateError`."""
    encoded = renderer.learned(example.prompt, example.response, example.options)
    return [EncodedExample(ids, [False, *trained[1:]]) for ids, trained in encoded]


def cut(example: EncodedExample, limit: int) -> EncodedExample:
    """Truncated to `limit` tokens: first at the start of the prompt, down to half of the limit,
    then at the end of what follows. So an answer is never learned without its question."""
    excess = max(0, len(example) - limit)
    start = min(excess, max(0, example.trained.index(True) - limit // 2))
    kept = slice(start, start + limit)
    return replace(
        example,
        ids=example.ids[kept],
        trained=[False, *example.trained[kept][1:]],
        truncated=(start, excess - start),
    )


def _demonstration_of(columns: Columns, rules: ChatRules) -> Demonstration:
    name = _conversation(columns)
    if name is not None:
        messages = check_messages(columns.take(name), name)
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise BadLineError("no message is the assistant's: there is nothing to learn")
        first = roles.index("assistant")
        if first == 0:
            raise BadLineError("the first message is the assistant's: it answers nothing")
        prompt: Prompt = check_prompt(messages[:first])
        response: Any = messages[first:]
    else:
        _, prompt = take_prompt(columns)
        name, response = columns.take_first(RESPONSES, _response_hint(columns))
        if isinstance(response, str):
            response = check_text(response, name)
        else:
            response = check_messages(response, name)
            if response[0]["role"] != "assistant":
                raise BadLineError(f"the first message of {name!r} is not the assistant's")
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str) and any(turn.get("train") for turn in prompt):
            raise BadLineError("a message of the prompt is to be learned", ": give 'messages'")
        check_prompt(prompt)
    response = answer_to(prompt, response, chat=rules.template)
    prompt, options = complete_prompt(prompt, columns, rules)
    if isinstance(response, str) and not isinstance(prompt, str):
        response = [{"role": "assistant", "content": response}]
    if isinstance(response, str):
        if not response.strip():
            raise BadLineError("empty response")
        return Demonstration(prompt, response)
    learned = [message for message in response if is_learned(message)]
    if not learned:
        raise BadLineError("no message is to be learned", ": all of the assistant's say so")
    if any(map(is_silent, learned)):
        raise BadLineError("empty response")
    return Demonstration(prompt, response, options=options)


def _conversation(columns: Columns) -> str | None:
    """The column of a whole conversation: `messages`, or another unless prompt and response are
    there. One that ends before an answer is the prompt of the response beside it."""
    answered = columns.find(RESPONSES) is not None
    asked = columns.find(PROMPTS) is not None
    name = columns.find(CHATS[:1] if answered and asked else CHATS)
    turns = None if name is None else columns.row[name]
    if not answered or name is None or not isinstance(turns, list | tuple) or not turns:
        return name
    return name if check_messages(turns[-1:], name)[0]["role"] == "assistant" else None


def _response_hint(columns: Columns) -> str:
    """What to write where no column is a response."""
    other = columns.find(("responses", "answers", "completions", "outputs", "chosen"))
    if other is None:
        return f"; a response is named {', '.join(RESPONSES)}"
    return f"; write the one of {other!r} to learn as 'response'"

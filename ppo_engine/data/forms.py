"""The usual names of columns, and the prompt that a row's columns make together.

Where several columns could be the same thing, the order of the names decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppo_engine.data.chat import (
    check_messages,
    check_template_arguments,
    check_tools,
    without_flags,
)
from ppo_engine.data.columns import Columns, check_text, is_blank
from ppo_engine.data.dialogues import chat_if_dialogue
from ppo_engine.data.rows import BadLineError
from ppo_engine.errors import UserError
from ppo_engine.settings.schema import (
    DemonstrationDataConfig,
    PreferenceDataConfig,
    PromptDataConfig,
)
from ppo_engine.text.options import TEMPLATE_ARGUMENTS, as_columns
from ppo_engine.text.prompt import HasPrompt, Message, Prompt
from ppo_engine.text.template import RESERVED, ChatTemplate, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DataConfig = PromptDataConfig | PreferenceDataConfig | DemonstrationDataConfig

PROMPTS = ("prompt", "instruction", "question", "query", "problem", "request", "input")
INPUTS = ("input", "context")  # what an instruction is about: Alpaca's name, Dolly's
CHATS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORY = "history"  # turns before the prompt
TOOLS = ("tools", "functions")
RESPONSES = (
    "response", "completion", "output", "solution", "answer", "reply", "target", "generation",
)  # fmt: skip
PAIRS = (  # the better and the worse response
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("preferred", "dispreferred"),
    ("preferred_response", "dispreferred_response"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("better", "worse"),
)
# All that can tell a model what is asked.
ASKING = (*PROMPTS, *CHATS, *INPUTS, *SYSTEMS, HISTORY, *TOOLS, TEMPLATE_ARGUMENTS)

_SYSTEM_ROLES = ("system", "developer")
_PROMPT_HINT = f"; a prompt is named {', '.join(PROMPTS)}, a conversation {', '.join(CHATS)}"
_PAIR_HINT = (
    "; name two responses to a prompt 'chosen' and 'rejected', or give 'responses' with 'ranks'"
)


@dataclass(frozen=True)
class ChatRules:
    """Whether the tokenizer has a chat template, whether all text is to go through it, and the
    system message of chats that have none of their own."""

    template: bool
    as_chat: bool
    system: str = ""

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, as_chat: bool, system_prompt: str = ""
    ) -> ChatRules:
        if system_prompt:
            _check_system_prompt(tokenizer, system_prompt)
        if as_chat and not tokenizer.chat_template:
            raise UserError(
                f"data.as_chat=true needs a chat template, which the tokenizer of "
                f"{tokenizer.name_or_path!r} lacks: use a chat model, or leave it unset."
            )
        return cls(bool(tokenizer.chat_template), as_chat, system_prompt)


def reading(data: DataConfig) -> dict[str, Any]:
    """What the loaders of prompts, examples and preferences take of a command's `data` settings,
    besides what becomes of bad lines."""
    return {
        "as_chat": data.as_chat,
        "columns": data.columns,
        "system_prompt": data.system_prompt,
    }


def take_prompt(columns: Columns, names: Sequence[str] = (*PROMPTS, *CHATS)) -> tuple[str, Prompt]:
    """The one of `names` that holds the prompt, and the prompt: text (an instruction with its
    input) or messages, which may be a whole conversation with its answer: see `check_prompt`."""
    name, value = columns.take_first(names, _PROMPT_HINT)
    if not isinstance(value, str) or name in CHATS:
        return name, check_messages(value, name)
    parts = [check_text(value, name)]
    beside = columns.find(INPUTS) if name == "instruction" else None
    if beside is not None:
        parts.append(check_text(columns.take(beside), beside))
    return name, "\n\n".join(part for part in parts if part.strip())


def check_prompt(prompt: Prompt) -> Prompt:
    """The same prompt, if there is something to answer."""
    last = {"role": "user", "content": prompt} if isinstance(prompt, str) else prompt[-1]
    if last["role"] == "assistant":
        raise BadLineError("the prompt's last message is the assistant's, with nothing to answer")
    if last["role"] != "tool" and not last["content"].strip():
        raise BadLineError("empty prompt", "" if isinstance(prompt, str) else " (its last message)")
    return prompt


def complete_prompt(
    prompt: Prompt, columns: Columns, rules: ChatRules
) -> tuple[Prompt, dict[str, Any]]:
    """The prompt with what other columns tell the model, and the row's options for the template.

    A system message, the turns before, tools and template arguments can only be told in a chat: a
    text prompt beside them, or under the rules' system message, becomes a user's message, as it
    does where the rules say so.
    """
    name = next((s for s in SYSTEMS if not is_blank(columns.row.get(s))), None)
    system = check_text(columns.take(name), name) if name else ""
    before = _history(columns)
    options = _options(columns)
    if isinstance(prompt, str) and rules.template:
        prompt = chat_if_dialogue(prompt)
    if isinstance(prompt, str):
        told = {name or SYSTEMS[0]: system, HISTORY: before, **as_columns(options)}
        needing = [what for what, value in told.items() if value]
        if needing and not rules.template:
            raise BadLineError(
                f"{needing[0]!r} needs a chat template",
                ", which the tokenizer lacks: write it into the prompt, or use a chat model",
            )
        if not (needing or rules.as_chat or rules.system):
            return prompt, {}
        prompt = [{"role": "user", "content": prompt}]
    prompt = without_flags(prompt)
    if not system and not any(turn["role"] in _SYSTEM_ROLES for turn in (*before, *prompt)):
        system = rules.system
    start = 1 if prompt[0]["role"] in _SYSTEM_ROLES else 0
    if start and system and prompt[0]["content"] != system:
        raise BadLineError(f"{name!r} and the first message are two different system messages")
    first = [{"role": "system", "content": system}] if system and not start else prompt[:start]
    rest = prompt[start:]
    # What `generate` wrote holds them already.
    return [*first, *(before if rest[: len(before)] != before else []), *rest], options


def names_of_pair(columns: Columns) -> tuple[str, str]:
    """The columns of the better and of the worse response."""
    if columns.find(["better_response_id"]):  # of response_0 and response_1
        number = columns.take("better_response_id")
        if number not in (0, 1):
            raise BadLineError("'better_response_id' must be 0 or 1", f", not {number!r}")
        better = int(number)  # 1.0 where a value of the column was missing
        names = (f"response_{better}", f"response_{1 - better}")
    else:
        # One with both columns before one that shares a name with it.
        there = [sum(columns.find([name]) is not None for name in pair) for pair in PAIRS]
        if not any(there) and columns.find(["label"]):
            raise BadLineError(
                "'label' judges one response alone",
                ": preferences compare two to one prompt, as 'chosen' and 'rejected'",
            )
        names = PAIRS[there.index(max(there))]
    for name in names:
        columns.take_first([name], _PAIR_HINT)
    return names


def text_note(
    examples: Sequence[HasPrompt], tokenizer: PreTrainedTokenizerBase, unit: str
) -> list[str]:
    """A note where a chat model is to read text as it is: people seldom mean that."""
    count = sum(isinstance(example.prompt, str) for example in examples)
    return [
        f"{count} of {len(examples)} {unit} are plain text, which the model reads as it is, to "
        "be continued; `ppo-engine generate --prompt` asks through its chat template. If they are "
        "questions, data.as_chat=true makes them a user's messages."
    ] * bool(count and tokenizer.chat_template)


def _check_system_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """A UserError where the tokenizer's chat template has no place for a system message."""
    name = f"the tokenizer of {tokenizer.name_or_path!r}"
    if not tokenizer.chat_template:
        raise UserError(
            f"data.system_prompt needs a chat template, which {name} lacks: write it into the "
            "prompts, or use a chat model."
        )
    chat = [{"role": "system", "content": text}, {"role": "user", "content": "A question."}]
    try:
        ChatTemplate(tokenizer).render(chat, ask=True)
    except TemplateError as error:
        raise UserError(
            f"data.system_prompt: the chat template of {name} takes no system message ({error}): "
            "leave it unset, and write it into the prompts."
        ) from error


def _history(columns: Columns) -> list[Message]:
    """The turns before the prompt: pairs of question and answer, or messages."""
    value = columns.take(HISTORY)
    if not value:
        return []
    if isinstance(value, list | tuple) and all(_is_pair(turn) for turn in value):
        roles = ("user", "assistant")
        return [
            {"role": role, "content": check_text(text, HISTORY)}
            for pair in value
            for role, text in zip(roles, pair, strict=True)
        ]
    return without_flags(check_messages(value, HISTORY))


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2


def _options(columns: Columns) -> dict[str, Any]:
    name, options = columns.find(TOOLS), {}
    if name is not None:
        tools = check_tools(columns.take(name), name)
        options = {"tools": tools} if tools else {}
    if columns.find([TEMPLATE_ARGUMENTS]):
        arguments = check_template_arguments(columns.take(TEMPLATE_ARGUMENTS), TEMPLATE_ARGUMENTS)
        wrong = sorted(arguments.keys() & RESERVED)
        if wrong:
            raise BadLineError(f"{TEMPLATE_ARGUMENTS!r} must not set {wrong[0]!r}")
        options |= arguments
    return options

"""Chat messages in the forms that people have them in, checked into one.

A checked message has `role` and `content`, both text, and whatever else it said (`tool_calls`,
`reasoning_content`, `name`, …), for the chat template. What could not reach the template is a
`BadLineError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_engine.data.columns import check_text, kind
from ppo_engine.data.rows import BadLineError
from ppo_engine.text.prompt import Message
from ppo_engine.text.template import THOUGHTS

# What ShareGPT and others call the speakers for whom templates have one name.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_SPEAKERS = {"system", "developer", "user", "assistant", "tool", *_ROLES}
_TEXT_PARTS = ("text", "input_text", "output_text")
# Whether a message is learned: of Axolotl, ms-swift, …; `weight` is OpenAI's, 0 or 1.
_FLAGS = ("train", "training", "trainable", "loss", "weight")
# Others' flags, of which some mean the opposite, and weights of more than two values.
_FOREIGN_FLAGS = ("mask", "masked", "loss_mask", "loss_scale", "loss_weight")


def check_messages(messages: Any, name: str) -> list[Message]:
    """Messages in OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`), one or more.

    Content parts that are text are joined, tool calls have their arguments as objects, keys that
    are null (as Arrow fills them in) are dropped, and the flags that say what is learned become
    one, `train`, on the assistant's messages.
    """
    if isinstance(messages, Mapping):
        messages = [messages]
    if isinstance(messages, str):
        raise BadLineError(f"{name!r} must be chat messages, not text")
    if not isinstance(messages, Sequence):
        raise BadLineError(f"{name!r} must be text or chat messages", f", not {kind(messages)}")
    if not messages:
        raise BadLineError(f"{name!r} is an empty list of messages")
    return [_check_message(message, name, index) for index, message in enumerate(messages)]


def check_tools(tools: Any, name: str) -> list[dict[str, Any]]:
    """Descriptions of functions, or the JSON text of a list of them, as chat templates take them:
    each `{"type": "function", "function": {…}}`."""
    if isinstance(tools, str):
        tools = _parsed(tools, name) if tools.strip() else []
    if not isinstance(tools, list | tuple):
        raise BadLineError(f"{name!r} must be a list of functions", f", not {kind(tools)}")
    found = []
    for tool in _without_nulls(tools, name):
        if not isinstance(tool, dict) or not isinstance(_function(tool).get("name"), str):
            raise BadLineError(f"{name!r} has a tool without the name of a function")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return found


def check_template_arguments(arguments: Any, name: str) -> dict[str, Any]:
    """Arguments of a row for the chat template, a dictionary or its JSON text."""
    if isinstance(arguments, str):
        arguments = _parsed(arguments, name) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise BadLineError(f"{name!r} must be a dictionary", f", not {kind(arguments)}")
    return dict(_without_nulls(arguments, name))


def without_flags(messages: Sequence[Message]) -> list[Message]:
    """The same where nothing says what is learned: for prompts and preferences."""
    return [{key: x for key, x in message.items() if key != "train"} for message in messages]


def is_learned(message: Message) -> bool:
    """Whether it is an answer to learn: every one of the assistant's, unless it says otherwise."""
    return message["role"] == "assistant" and bool(message.get("train", True))


def is_silent(message: Message) -> bool:
    """Whether it says nothing, in content, thoughts or tool calls."""
    said = (message.get(key) for key in ("content", "tool_calls", *THOUGHTS))
    return not any(x.strip() if isinstance(x, str) else x for x in said)


def _check_message(message: Any, name: str, index: int) -> Message:
    where = f" (message {index})"
    more = _without_nulls(message, name) if isinstance(message, Mapping) else {}
    speaker = "role" if "role" in more or "from" not in more else "from"
    said = "content" if "content" in more or "value" not in more else "value"
    # Of an assistant that calls a tool, or only thinks, the content may be missing.
    speaks = not is_silent({"content": "", **more}) or "function_call" in more
    if speaker not in more or not (speaks or said in more or said in message):
        raise BadLineError(f"{name!r} has a message without 'role' and 'content'", where)
    given = check_text(more.pop(speaker), f"{name}.{speaker}")
    content = more.pop(said, None)
    known = given.lower() if given.lower() in _SPEAKERS else given
    if speaker == "from" and known not in _SPEAKERS:
        raise BadLineError(
            f"{name!r} has a message from {given!r}",
            f"{where}: expected human, gpt, system, tool, function_call or observation",
        )
    role = _ROLES.get(known, known)
    calls = more.pop("tool_calls", [])
    if known == "function_call":
        calls, content = check_text(content, f"{name}.{said}"), ""
    calls = _check_calls(calls, f"{name}.tool_calls")
    if "function_call" in more:  # before OpenAI had `tool_calls`
        calls += _check_calls(more.pop("function_call"), f"{name}.function_call")
    if calls:
        more["tool_calls"] = calls
    learned = _take_flag(more, name, where)
    if learned and role != "assistant":
        raise BadLineError(f"{name!r} asks to learn a message that is not the assistant's", where)
    if learned is not None and role == "assistant":
        more["train"] = learned
    if content is None and role == "assistant" and speaks:
        content = ""
    return {"role": role, "content": _check_content(content, f"{name}.{said}"), **more}


def _check_content(content: Any, name: str) -> str:
    """Text, or the text of content parts."""
    if not isinstance(content, list | tuple):
        return check_text(content, name)
    texts = []
    for part in content:
        typed = isinstance(part, Mapping)
        text = part.get("text") if typed and part.get("type", "text") in _TEXT_PARTS else part
        if not isinstance(text, str):
            what = part.get("type") if typed else kind(part)
            raise BadLineError(f"{name!r} has a part that is not text", f": {what}")
        texts.append(text)
    return "".join(texts)


def _check_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """One or more tool calls, or their JSON text, as
    `{"type": "function", "function": {"name": …, "arguments": {…}}}`."""
    calls = _parsed(calls, name) if isinstance(calls, str) else calls
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not isinstance(_function(call).get("name"), str):
            raise BadLineError(f"{name!r} has a call without the name of a function")
        function = dict(_function(call))
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{name}.arguments") if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise BadLineError(f"{name + '.arguments'!r} is no object", f" but {kind(arguments)}")
        function["arguments"] = arguments
        around = call if "function" in call else {}
        if not around:  # a bare function
            around = {key: function.pop(key) for key in ("id", "type") if key in function}
        found.append({"type": "function", **around, "function": function})
    return found


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or a call, which some write without what is around it."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _take_flag(message: dict[str, Any], name: str, where: str) -> bool | None:
    """Takes the flags out of `message`: whether it is learned, None where it does not say."""
    if "train_detail" in message:
        raise BadLineError(f"{name!r} has 'train_detail'", f"{where}: a message is learned whole")
    foreign = next((flag for flag in _FOREIGN_FLAGS if flag in message), None)
    if foreign is not None:
        raise BadLineError(
            f"{name!r} has {foreign!r}",
            f"{where}: say with 'train', true or false, what is learned",
        )
    given = {flag: message.pop(flag) for flag in _FLAGS if flag in message}
    for flag, value in given.items():
        if not (value in (0, 1) if flag == "weight" else isinstance(value, bool)):
            expected = "0 or 1" if flag == "weight" else "true or false"
            raise BadLineError(f"{name + '.' + flag!r} must be {expected}", f", not {value!r}")
    said = {bool(value) for value in given.values()}
    if len(said) > 1:
        raise BadLineError(f"{name!r} has flags that contradict each other", f"{where}: {given}")
    return said.pop() if said else None


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"{name!r} is text, but not JSON", f" ({error})") from None


def _without_nulls(value: Any, name: str) -> Any:
    """Lists and dictionaries anew, without the keys that are null; only what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _without_nulls(x, name) for k, x in value.items() if x is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item, name) for item in value]
    if isinstance(value, str):
        return check_text(value, name)
    if value is not None and not isinstance(value, int | float):
        raise BadLineError(f"{name!r} holds what JSON cannot", f": {kind(value)}")
    return value

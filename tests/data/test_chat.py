"""Chat messages: every form that is taken, what of them is kept, and what is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ppo_engine.data.chat import check_messages, check_template_arguments, check_tools
from ppo_engine.data.rows import BadLineError

CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "day": None}},
}
AS_TEXT = {"name": "weather", "arguments": '{"city": "Oslo", "day": null}'}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def said(**message: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "Blue.", **message}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # What is beside role and content is kept, and null is not.
        (said(reasoning_content="Sky?"), said(reasoning_content="Sky?")),
        (said(name="Ada", refusal=None, audio=None), said(name="Ada")),
        (
            {"role": "tool", "content": "3 °C", "tool_call_id": "1"},
            {"role": "tool", "content": "3 °C", "tool_call_id": "1"},
        ),
        (
            {"role": "assistant", "content": None, "thinking": "Sky?"},
            {"role": "assistant", "content": "", "thinking": "Sky?"},
        ),
        # Tool calls, with the null that a text of arguments holds, and without Arrow's.
        ({"role": "assistant", "content": None, "tool_calls": [{"function": AS_TEXT}]}, CALLS),
        ({"role": "assistant", "tool_calls": [AS_TEXT]}, CALLS),
        ({"role": "assistant", "content": None, "function_call": AS_TEXT}, CALLS),
        (
            said(tool_calls=[{"id": "1", **CALL, "index": None}]),
            said(tool_calls=[{"id": "1", "type": "function",
                              "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]),
        ),
        (said(tool_calls=[{"id": "1", "name": "now"}]),
         said(tool_calls=[{"id": "1", "type": "function",
                           "function": {"name": "now", "arguments": {}}}])),
        (said(tool_calls=[]), said()),
        (said(tool_calls=json.dumps([CALL])), said(tool_calls=[CALL])),
        (said(tool_calls=json.dumps([CALL]), function_call=AS_TEXT), said(tool_calls=[CALL] * 2)),
        # Parts that are text.
        (said(content=[{"type": "text", "text": "Bl", "image_url": None}, "ue."]), said()),
        # ShareGPT, where a column of Arrow may hold the keys of both forms.
        ({"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"from": "gpt", "value": "Blue.", "role": None, "content": None}, said()),
        ({"from": "observation", "value": "3"}, {"role": "tool", "content": "3"}),
        ({"from": "function_call", "value": json.dumps(AS_TEXT)}, CALLS),
        ({"from": "function_call", "value": json.dumps([CALL])}, CALLS),
        ({"role": "model", "content": "Blue."}, said()),
        ({"from": "Assistant", "value": "Blue."}, said()),
        ({"role": "ipython", "content": "3"}, {"role": "ipython", "content": "3"}),
        # What is learned.
        (said(weight=0), said(train=False)),
        (said(weight=1, loss=True), said(train=True)),
        (said(training=False), said(train=False)),
        ({"role": "user", "content": "Hi", "trainable": False}, {"role": "user", "content": "Hi"}),
    ],
)  # fmt: skip
def test_forms_of_messages(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert check_messages([message], "messages") == [expected]
    assert check_messages(message, "messages") == [expected]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (said(content=[{"type": "image_url", "image_url": "x"}]), "not text: image_url"),
        (said(content=[{"type": "text", "text": "a"}, 3]), "not text: int"),
        (said(content=None), "'messages.content' must be text, not null"),
        ({"role": "user", "content": None, "tool_calls": [AS_TEXT]}, "must be text, not null"),
        ({"role": "assistant", "refusal": "No."}, r"without 'role' and 'content' \(message 0\)"),
        ({"from": "narrator", "value": "x"}, r"from 'narrator' \(message 0\): expected human, gpt"),
        (
            {"from": "function_call", "value": "weather()"},
            "'messages.tool_calls' is text, but not JSON",
        ),
        (said(tool_calls=[{"function": {"arguments": {}}}]), "without the name of a function"),
        (said(tool_calls="weather"), "'messages.tool_calls' is text, but not JSON"),
        (
            said(tool_calls=[{"name": "f", "arguments": "{city"}]),
            "arguments' is text, but not JSON",
        ),
        (said(tool_calls=[{"name": "f", "arguments": "[1]"}]), "arguments' is no object but list"),
        (said(name=b"Ada"), "holds what JSON cannot: bytes"),
        (said(reasoning_content="\ud800"), "lone surrogate"),
        (said(weight=0.5), "'messages.weight' must be 0 or 1, not 0.5"),
        (said(train="no"), "'messages.train' must be true or false, not 'no'"),
        (said(weight=1, train=False), "flags that contradict each other"),
        (said(train_detail=[]), "'train_detail' .*: a message is learned whole"),
        (said(masked=True), "'masked' .*: say with 'train'"),
        (said(loss_scale=0.5), "'loss_scale' .*: say with 'train'"),
        ({"role": "user", "content": "Hi", "train": True}, "asks to learn .* not the assistant's"),
    ],
)
def test_what_would_be_lost_is_an_error(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadLineError, match=problem):
        check_messages([message], "messages")


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER],
        [WEATHER["function"]],
        json.dumps([WEATHER]),
        [{**WEATHER, "strict": None}],
    ],
)
def test_tools(tools: Any) -> None:
    assert check_tools(tools, "tools") == [WEATHER]


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("weather", "'tools' is text, but not JSON"),
        ({"weather": 1}, "must be a list of functions, not dict"),
        ([{"parameters": {}}], "a tool without the name of a function"),
        (["weather"], "a tool without the name of a function"),
    ],
)
def test_bad_tools(tools: Any, problem: str) -> None:
    with pytest.raises(BadLineError, match=problem):
        check_tools(tools, "tools")


def test_template_arguments() -> None:
    for given in ({"enable_thinking": False, "x": None}, '{"enable_thinking": false}'):
        assert check_template_arguments(given, "kwargs") == {"enable_thinking": False}
    with pytest.raises(BadLineError, match="'kwargs' must be a dictionary, not list"):
        check_template_arguments([], "kwargs")

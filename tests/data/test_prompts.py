"""Prompts: text, messages, and those that are neither or too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_files import BLUE, USER, write
from tiny import tiny_tokenizer

from ppo_engine.data.prompts import (
    PromptExample,
    columns_of,
    limit_prompts,
    load_prompts,
    prompts_from_sequence,
)
from ppo_engine.errors import UserError
from ppo_engine.text.renderer import Renderer

CHAT = tiny_tokenizer()
TEXT = tiny_tokenizer(chat_template=False)


def test_prompts_as_text_and_messages_keep_their_columns(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "Hi", "answer": 42}, {"prompt": [USER]})
    examples, skipped = load_prompts(file, tokenizer=TEXT)
    assert examples == [
        PromptExample("Hi", {"answer": 42}, f"{file}:1"),
        PromptExample([USER], {}, f"{file}:2"),
    ]
    assert skipped.total == 0 and str(skipped) == "no lines skipped"


BAD_PROMPTS = [
    ({"text": "x"}, "no column 'prompt' (columns: 'text')"),
    ({"prompt": ""}, "empty prompt"),
    ({"prompt": " \n"}, "empty prompt"),
    ({"prompt": None}, "must be text or chat messages, not null"),
    ({"prompt": 3}, "must be text or chat messages, not int"),
    ({"prompt": []}, "empty list"),
    ({"prompt": ["hello"]}, "without 'role' and 'content' (message 0)"),
    ({"prompt": [{"role": "user"}]}, "without 'role' and 'content'"),
    ({"prompt": [{"role": "user", "content": None}]}, "must be text, not null"),
    ({"prompt": [{"role": 1, "content": "x"}]}, "must be text, not int"),
    (
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
        "has a part that is not text: text",
    ),
    ({"prompt": [USER, BLUE]}, "last message is the assistant's"),
    ({"prompt": [{"role": "user", "content": " "}]}, "empty prompt"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PROMPTS)
def test_bad_prompts(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write(tmp_path, {"prompt": "Say hello."}, row)
    with pytest.raises(UserError) as caught:
        load_prompts(file, tokenizer=TEXT)
    assert "data.jsonl:2" in str(caught.value) and message in str(caught.value)
    with pytest.raises(UserError) as caught:
        prompts_from_sequence(["fine", row], tokenizer=TEXT)
    assert "prompts[1]" in str(caught.value) and message in str(caught.value)
    examples, skipped = load_prompts(file, on_bad_line="skip", tokenizer=TEXT)
    assert len(examples) == 1 and skipped.total == 1
    with pytest.raises(UserError, match=r"No usable prompt in .*1 skipped"):
        load_prompts(write(tmp_path, row), on_bad_line="skip", tokenizer=TEXT)


def test_prompts_from_python() -> None:
    examples, _ = prompts_from_sequence(["a", [USER], {"prompt": "b", "k": 1}], tokenizer=TEXT)
    assert [example.prompt for example in examples] == ["a", [USER], "b"]
    assert examples[2].columns == {"k": 1}
    with pytest.raises(UserError, match=r"prompts\[0\]: lone surrogate"):
        prompts_from_sequence(["\ud800"], tokenizer=TEXT)
    with pytest.raises(UserError, match="No usable prompt"):
        prompts_from_sequence([], tokenizer=TEXT)


def test_over_long_prompt_says_where_how_long_and_what_to_do() -> None:
    examples, _ = prompts_from_sequence(["short", "x" * 50], tokenizer=TEXT)
    with pytest.raises(UserError) as caught:
        limit_prompts(examples, Renderer(TEXT), 49)
    for part in ("prompts[1]", "50 tokens", "data.max_prompt_tokens = 49", "on_bad_line=skip"):
        assert part in str(caught.value)
    assert limit_prompts(examples, Renderer(TEXT), 50)[0] == examples
    kept, skipped = limit_prompts(examples, Renderer(TEXT), 49, on_bad_line="skip")
    assert kept == examples[:1] and skipped.reasons == {"prompt too long": 1}
    with pytest.raises(UserError, match="No usable prompt is left: 2 skipped"):
        limit_prompts(examples, Renderer(TEXT), 1, on_bad_line="skip")


def test_the_template_counts_towards_the_length() -> None:
    examples, _ = prompts_from_sequence([[{"role": "user", "content": "hi"}]], tokenizer=TEXT)
    rendered = len("<user\nhi<\n<assistant\n")  # one token per byte, one per special token
    assert limit_prompts(examples, Renderer(CHAT), rendered)[0] == examples
    with pytest.raises(UserError, match=f"{rendered} tokens"):
        limit_prompts(examples, Renderer(CHAT), rendered - 1)


def test_messages_without_a_chat_template() -> None:
    examples, _ = prompts_from_sequence(["text", [USER]], tokenizer=TEXT)
    with pytest.raises(UserError, match="no chat template"):
        limit_prompts(examples, Renderer(TEXT), 100, on_bad_line="skip")


def test_prompt_that_the_template_refuses() -> None:
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    examples, _ = prompts_from_sequence([[USER, USER]], tokenizer=TEXT)
    with pytest.raises(UserError, match=r"prompts\[0\]: refused .*roles must alternate"):
        limit_prompts(examples, Renderer(strict), 100)


def test_columns_that_some_rows_lack_hold_none() -> None:
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}, {"prompt": "c", "x": 3}]
    examples, _ = prompts_from_sequence(rows, tokenizer=TEXT)
    assert columns_of(examples) == {"x": [1, None, 3], "y": [None, 2, None]}


@pytest.mark.parametrize(("limit", "room"), [(5, 99), (99, 5)])
def test_a_prompt_may_have_as_many_tokens_as_the_limit_and_the_room(limit: int, room: int) -> None:
    examples = [PromptExample("a" * n, {}, f"row {n}") for n in range(1, 8)]
    kept, skipped = limit_prompts(examples, Renderer(TEXT), limit, room=room, on_bad_line="skip")
    assert [len(str(example.prompt)) for example in kept] == [1, 2, 3, 4, 5]
    assert skipped.total == 2
    with pytest.raises(UserError, match=r"row 6: prompt too long: 6 tokens, more than .* = 5"):
        limit_prompts(examples, Renderer(TEXT), limit, room=room)

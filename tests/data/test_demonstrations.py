"""Examples to learn from: every accepted form, and token by token what of it is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from ppo_engine.data.demonstrations import (
    Demonstration,
    EncodedExample,
    cut,
    encode_demonstration,
    encode_demonstrations,
    load_demonstrations,
)
from ppo_engine.errors import UserError
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import TemplateError

CHAT = tiny_tokenizer()
TEXT = tiny_tokenizer(chat_template=False)
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "A color?"}
BLUE = {"role": "assistant", "content": "Blue."}
MORE = {"role": "user", "content": "More?"}
RED = {"role": "assistant", "content": "Red."}
DIALOGUE = "\n\nHuman: A color?\n\nAssistant:"


def shown(row: dict[str, Any], tokenizer: Any = CHAT, end_ids: Any = None) -> list[str]:
    """Each example of a row as text, what is learned in brackets."""
    [example], _ = load_demonstrations([row], tokenizer=tokenizer)
    found = []
    for encoded in encode_demonstration(Renderer(tokenizer, end_ids=end_ids or ()), example):
        text, inside = "", False
        for token, trained in zip(encoded.ids, encoded.trained, strict=True):
            text += "[" * (trained and not inside) + "]" * (inside and not trained)
            text += tokenizer.decode([token])
            inside = trained
        found.append(text + "]" * inside)
    return found


# Forms


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "Q: ", "response": "A"}, "Q: ", "A"),
        ({"prompt": "Q: ", "completion": "A", "source": "x"}, "Q: ", "A"),
        ({"prompt": [USER], "response": "Blue."}, [USER], [BLUE]),
        ({"prompt": [USER], "completion": [BLUE]}, [USER], [BLUE]),
        ({"prompt": "A color?", "completion": [BLUE]}, [USER], [BLUE]),
        ({"prompt": DIALOGUE, "response": "Blue."}, [USER], [BLUE]),
        ({"messages": [SYSTEM, USER, BLUE, MORE, RED]}, [SYSTEM, USER], [BLUE, MORE, RED]),
        ({"messages": None, "prompt": "Q", "response": "A"}, "Q", "A"),  # columns of a data set
    ],
)
def test_forms(row: dict[str, Any], prompt: Any, response: Any, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row))
    found, skipped = load_demonstrations(file, tokenizer=CHAT)
    assert found == [Demonstration(prompt, response, f"{file}:1")] and not skipped.total


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q"}, "no column 'response' (columns: 'prompt')"),
        ({"response": "A"}, "no column 'prompt'"),
        ({"prompt": " ", "response": "A"}, "empty prompt"),
        ({"prompt": "Q", "response": " \n"}, "empty response"),
        ({"prompt": "Q", "response": None}, "must be text or chat messages, not null"),
        ({"prompt": "Q", "completion": 3}, "must be text or chat messages, not int"),
        ({"prompt": [USER], "response": [USER]}, "the first message of 'response' is not the"),
        ({"messages": []}, "empty list"),
        ({"messages": [USER]}, "no message is the assistant's: there is nothing to learn"),
        ({"messages": [BLUE, USER]}, "the first message is the assistant's: it answers nothing"),
        ({"messages": [USER, {**BLUE, "content": ""}]}, "empty response"),
        ({"messages": [USER, {**BLUE, "content": None}]}, "must be text, not null"),
        ({"messages": "hello"}, "'messages' must be chat messages, not text"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "Q", "response": "A"}) + "\n" + json.dumps(row))
    with pytest.raises(UserError) as caught:
        load_demonstrations(file, tokenizer=CHAT)
    assert "data.jsonl:2: " in str(caught.value) and message in str(caught.value)
    found, skipped = load_demonstrations(file, tokenizer=CHAT, on_bad_line="skip")
    assert len(found) == 1 and skipped.total == 1
    with pytest.raises(UserError, match="No usable example"):
        load_demonstrations([row], tokenizer=CHAT, on_bad_line="skip")


def test_keys_of_messages_that_are_not_shown_are_told() -> None:
    def read(**keys: str) -> list[str]:
        rows, _ = load_demonstrations([{"messages": [{**USER, **keys}, BLUE]}], tokenizer=CHAT)
        _, skipped, _ = encode_demonstrations(Renderer(CHAT), rows, 99, name="training")
        return skipped.notes("Examples")

    assert read(language="en") == [
        "Examples: the chat template does not show 'language' of messages (1 row)."
    ]
    assert read() == []
    with pytest.raises(UserError, match="does not show the 'name' of messages"):
        read(name="Al")


def test_messages_without_a_chat_template() -> None:
    with pytest.raises(UserError, match="no chat template"):
        load_demonstrations([{"messages": [USER, BLUE]}], tokenizer=TEXT)


# What is learned

END, START = "<|im_end|>", "<|im_start|>"
ASKED = f"{START}user\nA color?{END}\n{START}assistant\n"
ASKED_MORE = f"\n{START}user\nMore?{END}\n{START}assistant\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q: ", "response": "A."}, f"Q: [A.{END}]"),
        ({"prompt": [USER], "response": "Blue."}, f"{ASKED}[Blue.{END}]"),
        (
            {"messages": [USER, BLUE, MORE, RED]},
            f"{ASKED}[Blue.{END}]{ASKED_MORE}[Red.{END}]",
        ),
        (  # answers that the prompt holds are not to be learned
            {"prompt": [USER, BLUE, MORE], "response": "Red."},
            f"{ASKED}Blue.{END}{ASKED_MORE}[Red.{END}]",
        ),
        (
            {"messages": [SYSTEM, USER, BLUE]},
            f"{START}system\nBe brief.{END}\n{ASKED}[Blue.{END}]",
        ),
        ({"messages": [USER, BLUE, MORE]}, f"{ASKED}[Blue.{END}]"),  # nothing after it is learned
    ],
)
def test_only_answers_and_their_ends_are_learned(row: dict[str, Any], expected: str) -> None:
    assert shown(row) == [expected]


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_templates_that_drop_earlier_thoughts_make_an_example_of_each_answer() -> None:
    forgets = with_template(
        CHAT_TEMPLATE.replace(
            "{{ message['content'] }}",
            "{{ message['content'] if loop.last else message['content'].split('|')[-1] }}",
        )
    )
    thought = {"role": "assistant", "content": "hm|Blue."}
    found = shown({"messages": [USER, thought, MORE, RED]}, forgets)
    assert found == [f"{ASKED}[hm|Blue.{END}]", f"{ASKED}Blue.{END}{ASKED_MORE}[Red.{END}]"]


def test_a_thought_that_the_prompt_opens_is_closed() -> None:
    opens = with_template(
        CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    )
    assert shown({"messages": [USER, BLUE]}, opens) == [f"{ASKED}<think>[\n</think>\n\nBlue.{END}]"]


def test_templates_with_another_end_of_turn_or_none() -> None:
    other = with_template(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}\0\n{% endfor %}"
    )
    nul = other("\0")["input_ids"][0]
    row = {"messages": [USER, BLUE, MORE, RED]}
    # Every token that the model may end with is known from its checkpoint.
    assert shown(row, other, {nul, other.eos_token_id}) == [
        "user:A color?\0\n[assistant:Blue.\0]\nuser:More?\0\n[assistant:Red.\0]"
    ]
    open_ended = with_template("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    # An answer ends with EOS, and is an example of its own where later ones do not see that.
    assert shown(row, open_ended) == [
        f"A color? [Blue. {END}]",
        f"A color? Blue. More? [Red. {END}]",
    ]


def test_a_conversation_that_the_template_refuses() -> None:
    strict = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match=r"refused .*roles must alternate"):
        encode_demonstration(Renderer(strict), Demonstration([USER], [BLUE]))


@pytest.mark.parametrize(
    ("asked", "answered", "limit", "kept"),
    [
        (4, 3, 8, range(7)),
        (10, 3, 8, range(5, 13)),  # the start of the prompt is truncated
        (10, 6, 8, range(6, 14)),  # down to half of the limit, then the end
        (2, 9, 8, range(8)),
        (1, 9, 2, range(2)),
    ],
)
def test_long_examples_keep_some_of_both(
    asked: int, answered: int, limit: int, kept: range
) -> None:
    example = EncodedExample(list(range(asked + answered)), [False] * asked + [True] * answered)
    found = cut(example, limit)
    assert found.ids == [*kept] and found.trained == [place >= asked for place in kept]


def test_an_answer_to_a_dialogue_has_no_space_before_it() -> None:
    row = {"prompt": "\n\nHuman: q\n\nAssistant:", "response": " c"}
    [found], _ = load_demonstrations([row], tokenizer=tiny_tokenizer())
    assert found.response == [{"role": "assistant", "content": "c"}]

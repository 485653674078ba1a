"""The chat templates for tests render conversations as the families do whose shape they have."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from templates import TEMPLATES, appends_eos, gemma, llama3, phi3, qwen3, sentencepiece_tokenizer
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

CHAT = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "<think>\nt1\n</think>\n\na1"},
    {"role": "user", "content": "q2"},
]
ANSWER = {"role": "assistant", "content": "<think>\nt2\n</think>\n\na2"}
THOUGHT_2 = "<think>\nt2\n</think>\n\na2"
THOUGHT_1 = THOUGHT_2.replace("2", "1")

# Of each family: the conversation, and what stands behind it where an answer is asked for, and
# where it is given.
RENDERED = {
    "chatml": (
        f"<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n{THOUGHT_1}<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n",
        "<|im_start|>assistant\n",
        f"<|im_start|>assistant\n{THOUGHT_2}<|im_end|>\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: 09 Feb 2025\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{THOUGHT_1}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{THOUGHT_2}<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nq1<end_of_turn>\n"
        f"<start_of_turn>model\n{THOUGHT_1}<end_of_turn>\n"
        "<start_of_turn>user\nq2<end_of_turn>\n",
        "<start_of_turn>model\n",
        f"<start_of_turn>model\n{THOUGHT_2}<end_of_turn>\n",
    ),
    "phi3": (
        f"<|user|>\nq1<|end|>\n<|assistant|>\n{THOUGHT_1}<|end|>\n<|user|>\nq2<|end|>\n",
        "<|assistant|>\n",
        f"<|assistant|>\n{THOUGHT_2}<|end|>\n<|endoftext|>",
    ),
    "mistral": (
        f"<s>[INST] q1 [/INST] {THOUGHT_1}</s>[INST] q2 [/INST]",
        "",
        f" {THOUGHT_2}</s>",
    ),
    "qwen3": (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n",
        "<|im_start|>assistant\n",
        f"<|im_start|>assistant\n{THOUGHT_2}<|im_end|>\n",
    ),
    "r1": (
        "<|begin_of_sentence|><|User|>q1<|Assistant|>\n\na1<|end_of_sentence|><|User|>q2",
        "<|Assistant|><think>\n",
        "<|Assistant|>\n\na2<|end_of_sentence|>",
    ),
    "gptoss": (
        "<|start|>system<|message|>Current date: 2025-02-09\n\nReasoning: medium<|end|>"
        "<|start|>user<|message|>q1<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{THOUGHT_1}<|end|>"
        "<|start|>user<|message|>q2<|end|>",
        "<|start|>assistant",
        f"<|start|>assistant<|channel|>final<|message|>{THOUGHT_2}<|return|>",
    ),
}


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2025, 2, 9)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation(name) -> None:
    tokenizer, (before, asked, answered) = TEMPLATES[name](), RENDERED[name]
    assert rendered(tokenizer, CHAT, add_generation_prompt=True) == before + asked
    assert rendered(tokenizer, [*CHAT, ANSWER]) == before + answered


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_marker_is_one_token(name, tmp_path) -> None:
    """Also of a tokenizer that was saved and loaded."""
    TEMPLATES[name]().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = rendered(tokenizer, [*CHAT, ANSWER])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    added = tokenizer.get_added_vocab()
    assert sum(token in added.values() for token in ids) == sum(map(text.count, added))
    assert tokenizer.eos_token_id not in (None, tokenizer.pad_token_id)


SYSTEM = [{"role": "system", "content": "s"}, *CHAT]


@pytest.mark.parametrize(
    ("name", "messages"),
    [("gemma", SYSTEM), ("mistral", SYSTEM), ("gemma", CHAT[:1] * 2), ("mistral", CHAT[1:])],
)
def test_what_a_family_refuses(name, messages) -> None:
    with pytest.raises(Exception, match=r"not supported|must alternate"):
        rendered(TEMPLATES[name](), messages)


TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


def thought(text: str) -> dict[str, str]:
    """Under the keys of both families that have one."""
    return {"reasoning_content": text, "thinking": text}


CALLED = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], **thought("t")},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "a", **thought("u")},
]
TOOL = '{"type": "function", "function": {"name": "add"}}'


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            f"Today Date: 09 Feb 2025\n\n{TOOL}\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
            '<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>",
        ),
        (
            "qwen3",
            f"<|im_start|>system\n\n\n# Tools\n<tools>\n{TOOL}\n</tools><|im_end|>\n"
            "<|im_start|>user\nq<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nt\n</think>\n\n"
            '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n<think>\nu\n</think>\n\na<|im_end|>\n",
        ),
        (
            "gptoss",
            "<|start|>system<|message|>Current date: 2025-02-09\n\nReasoning: medium<|end|>"
            f"<|start|>developer<|message|># Tools\n\n{TOOL}\n<|end|>"
            "<|start|>user<|message|>q<|end|>"
            "<|start|>assistant<|channel|>analysis<|message|>t<|end|>"
            "<|start|>assistant to=functions.add<|channel|>commentary json<|message|>"
            '{"a": 1}<|call|>'
            '<|start|>functions to=assistant<|channel|>commentary<|message|>"3"<|end|>'
            "<|start|>assistant<|channel|>analysis<|message|>u<|end|>"
            "<|start|>assistant<|channel|>final<|message|>a<|return|>",
        ),
    ],
)
def test_tools_and_thoughts(name, expected) -> None:
    assert rendered(TEMPLATES[name](), CALLED, tools=TOOLS) == expected


def test_what_thoughts_become() -> None:
    """Without thinking the prompt closes one; a last answer has at least an empty one."""
    asked = rendered(qwen3(), CHAT, add_generation_prompt=True, enable_thinking=False)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    plain = rendered(qwen3(), [*CHAT, {"role": "assistant", "content": "a"}])
    assert plain.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>\n")


@pytest.mark.parametrize(("make", "end"), [(gemma, "<end_of_turn>"), (phi3, "<|end|>")])
def test_a_turn_ends_with_another_token_than_eos(make, end) -> None:
    tokenizer = make()
    assert tokenizer.eos_token != end and tokenizer.convert_tokens_to_ids(end) is not None


def test_sentencepiece_prepends_a_space() -> None:
    """Before any text, and again after each special token; it comes off where text is decoded."""
    tokenizer = sentencepiece_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a b</s>c")["input_ids"])
    assert tokens == ["<s>", "▁", "a", "▁", "b", "</s>", "▁", "c"]
    ids = tokenizer("é a", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "é a"


def test_a_tokenizer_that_appends_eos() -> None:
    tokenizer = appends_eos(llama3())
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == "<|begin_of_text|>a<|eot_id|>"
    assert llama3()("a")["input_ids"][-1] != tokenizer.eos_token_id

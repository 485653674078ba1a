"""Prompts and responses as token ids: what goes where they are too long together."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from ppo_engine.text.encoding import encode_dialogue, encode_prompt, encode_turns

TOKENIZER = tiny_tokenizer()
END = "<|im_end|>"
CHAT = [{"role": "user", "content": "abc"}]
ASKED = f"<|im_start|>user\nabc{END}\n<|im_start|>assistant\n"


def shown(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


@pytest.mark.parametrize(
    ("prompt", "limit", "finished", "expected"),
    [
        ("abcdef", 10, True, f"abcdefxyz{END}"),  # it fits exactly
        ("abcdef", 7, True, f"defxyz{END}"),  # the prompt's start goes
        ("abcdef", 7, False, "cdefxyz"),  # an unfinished response has no end
        ("abcdef", 5, True, f"fxyz{END}"),
        ("abcdef", 4, True, f"xyz{END}"),  # no room for the prompt
        ("abcdef", 2, True, "xy"),  # the response's end goes
        (CHAT, 99, True, f"{ASKED}xyz{END}"),
        (CHAT, 9, True, f"tant\nxyz{END}"),
    ],
)
def test_a_dialogue_loses_its_prompts_start_first(prompt, limit, finished, expected) -> None:
    ids = encode_dialogue(TOKENIZER, prompt, "xyz", limit, finished)
    assert shown(ids) == expected


def test_a_chat_prompt_asks_for_the_answer() -> None:
    assert shown(encode_prompt(TOKENIZER, CHAT)) == ASKED


def test_an_answer_is_learned_up_to_its_last_end() -> None:
    """One that holds an end itself too, and nothing of what the template writes behind it."""
    turns = [{"role": "assistant", "content": f"a{END}b"}]
    [(ids, trained)] = encode_turns(TOKENIZER, CHAT, turns, {TOKENIZER.eos_token_id})
    assert shown([t for t, learned in zip(ids, trained, strict=True) if learned]) == (
        f"a{END}b{END}"
    )
    assert shown(ids) == f"{ASKED}a{END}b{END}"


def test_a_template_writes_every_special_token_itself() -> None:
    """A tokenizer that begins each text with a BOS would begin the chat with two, and each answer
    with one; a prompt that is text has none but that."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = begins_with("<|im_start|>")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", END])
    assert tokenizer("a")["input_ids"][0] == start
    chat = encode_dialogue(tokenizer, CHAT, "xyz", 99)
    assert shown(chat) == f"{ASKED}xyz{END}" and chat.count(start) == 2
    text = encode_dialogue(tokenizer, "abc", "xyz", 99)
    assert text[0] == start and text[-1] == end and text.count(start) == 1


def begins_with(token: str) -> TemplateProcessing:
    return TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, TOKENIZER.convert_tokens_to_ids(token))]
    )

"""Chat templates: what reaches them, what they would lose, and what is known of their text."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from templates import chatml, gemma, gptoss, llama3, mistral, qwen3, r1

from ppo_engine.errors import UserError
from ppo_engine.text.template import ChatTemplate, TemplateError, opened_thought

USER = {"role": "user", "content": "q"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "c1"}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}
THINKS = {"role": "assistant", "content": "a", "reasoning_content": "hm"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (qwen3, "<think>\nhm\n</think>\n\na<|im_end|>"),
        (gptoss, "<|channel|>analysis<|message|>hm<|end|>"),
        (
            r1,
            "<|Assistant|>\n\na<|end_of_sentence|>",
        ),  # in its own form, and it drops all
    ],
)
def test_a_thought_reaches_the_template_under_the_key_that_it_knows(key, make, shown) -> None:
    message = {"role": "assistant", "content": "a", key: "hm"}
    assert shown in ChatTemplate(make()).render([USER, message], ask=False)


def test_tools_and_calls_reach_the_template() -> None:
    text = ChatTemplate(qwen3()).render([USER, CALLS, RESULT], ask=True, options={"tools": [TOOL]})
    assert '"description": "adds"' in text and "<tool_response>\n3\n</tool_response>" in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text


def test_keys_that_the_template_does_not_show() -> None:
    shows = chatml()
    shows.chat_template = "{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}"
    named = {**USER, "name": "Al", "language": "en", "train": False}
    assert ChatTemplate(shows).unseen([named]) == {"language"}
    assert ChatTemplate(qwen3()).unseen([named, CALLS, {**RESULT, "name": "add"}]) == {
        "language", "name",
    }  # fmt: skip


def test_a_template_that_writes_arguments_as_they_come_gets_text() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ':' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert ChatTemplate(tokenizer).render([USER, CALLS], ask=False) == 'qadd:{"a": 1}'


@pytest.mark.parametrize(
    ("make", "messages", "options", "lost"),
    [
        (chatml, [USER, THINKS], {}, "renders no thoughts"),
        (chatml, [USER, CALLS], {}, r"renders no tool calls, .* \(add\)"),
        (chatml, [USER], {"tools": [TOOL]}, r"renders no tools, .* \(add\)"),
        (r1, [USER, CALLS, USER], {}, "renders no tool calls"),
        (r1, [USER, {"role": "developer", "content": "Be brief."}], {}, "role 'developer'"),
        (r1, [USER, RESULT], {}, r"messages of the role 'tool' \(message 1\)"),
        (gemma, [{"role": "system", "content": "s"}, USER], {}, "System role not supported"),
        (mistral, [USER, USER], {}, "roles must alternate"),
        (llama3, [USER, {**CALLS, "tool_calls": [CALL, CALL]}], {}, "single tool-calls"),
        (qwen3, [USER], {"enable_thinkin": False}, "no variable 'enable_thinkin'"),
        (qwen3, [USER], {"add_generation_prompt": True}, "given 'add_generation_prompt' already"),
        (gptoss, [USER, {"role": "assistant", "content": 3, "thinking": "x"}], {}, "refused"),
    ],
)
def test_what_would_be_lost_is_an_error(make, messages, options, lost) -> None:
    with pytest.raises(TemplateError, match=lost):
        ChatTemplate(make()).render(messages, ask=False, options=options)


def lists_tools() -> Any:
    """A template that shows tools, and no calls of them."""
    tokenizer = chatml()
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("make", "messages", "options", "lost"),
    [
        (lists_tools, [USER, CALLS], {"tools": [TOOL]}, r"renders no tool calls, .* \(add\)"),
        (lists_tools, [USER], {"tools": [TOOL]}, None),
        # Each is left out, and its word stands in the text all the same.
        (chatml, [{"role": "user", "content": "add?"}], {"tools": [TOOL]}, r"no tools, .* \(add\)"),
        (chatml, [{"role": "user", "content": "add?"}, CALLS], {}, r"no tool calls, .* \(add\)"),
        (qwen3, [{"role": "user", "content": "add?"}], {"tools": [TOOL]}, None),
        (qwen3, [{"role": "user", "content": "add?"}, CALLS], {"tools": [TOOL]}, None),
        (r1, [{"role": "developer", "content": "User"}, USER], {}, "the role 'developer'"),
        (gemma, [USER, {"role": "assistant", "content": "model"}], {}, None),
    ],
)
def test_what_is_shown_is_not_told_by_chance(make, messages, options, lost) -> None:
    template = ChatTemplate(make())
    for _ in range(2):  # what was seen once is remembered
        if lost is None:
            template.render(messages, ask=False, options=options)
            continue
        with pytest.raises(TemplateError, match=lost):
            template.render(messages, ask=False, options=options)


@pytest.mark.parametrize("first", [0, 1])
def test_what_one_message_loses_is_not_said_of_others(first: int) -> None:
    """Whichever comes first: some templates drop the words beside a call."""
    tokenizer = chatml()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% else %}{{ m.content }}{% endfor %}{% endfor %}"
    )
    template, asked = ChatTemplate(tokenizer), {"role": "user", "content": "really?"}
    for number in (first, 1 - first, first):
        if number:
            template.render([asked, {"role": "assistant", "content": "really"}], ask=False)
            continue
        with pytest.raises(TemplateError, match="role 'assistant'"):
            template.render([asked, {**CALLS, "content": "really"}], ask=False)
    assert template.ending == ""


def test_former_thoughts_may_go_and_sampled_words_too() -> None:
    chat = [USER, {"role": "assistant", "content": "<think>hm</think>a"}, USER]
    assert "hm" not in ChatTemplate(qwen3()).render(chat, ask=True)
    only_a_thought = [USER, {"role": "assistant", "content": "word</think>"}]
    assert "word" not in ChatTemplate(r1()).render(only_a_thought, ask=False)
    odd = [USER, {"role": "assistant", "content": "a"}]
    forgets = chatml()
    forgets.chat_template = "{{ messages[0].content }}"
    assert ChatTemplate(forgets).render(odd, ask=False, sampled=True) == "q"
    with pytest.raises(TemplateError, match="role 'assistant'"):
        ChatTemplate(forgets).render(odd, ask=False)


def test_arguments_are_handed_over_and_unknown_ones_refused() -> None:
    def asked(arguments: dict[str, Any], options: dict[str, Any]) -> str:
        return ChatTemplate(qwen3(), arguments).render([USER], ask=True, options=options)

    empty = "<think>\n\n</think>\n\n"
    assert asked({"enable_thinking": False}, {}).endswith(empty)
    assert asked({}, {"enable_thinking": False}).endswith(empty)
    # A row's own go before those of the run.
    assert not asked({"enable_thinking": False}, {"enable_thinking": True}).endswith(empty)
    with pytest.raises(UserError, match=r"chat_template_kwargs: .* no variable 'think'"):
        ChatTemplate(qwen3(), {"think": False})
    for name in ("add_generation_prompt", "tools"):  # which the template does look at
        with pytest.raises(UserError, match=f"chat_template_kwargs must not set '{name}'"):
            ChatTemplate(qwen3(), {name: []})
    plain = chatml()
    plain.chat_template = None
    with pytest.raises(UserError, match="chat_template_kwargs needs a chat template"):
        ChatTemplate(plain, {"enable_thinking": False})
    # A reward model's template need not know what the policy's does.
    lenient = ChatTemplate(chatml(), {"enable_thinking": False}, lenient=True)
    assert lenient.render([USER], ask=True) == ChatTemplate(chatml()).render([USER], ask=True)


@pytest.mark.parametrize(("make", "shown"), [(llama3, "09 Feb 2025"), (gptoss, "2025-02-09")])
def test_a_template_that_shows_the_date_shows_the_runs(make, shown) -> None:
    date = datetime.date(2025, 2, 9)
    assert shown in ChatTemplate(make(), date=date).render([USER], ask=True)
    today = datetime.date.today()
    assert ChatTemplate(make()).date == today


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%d %B %Y')",
        'strftime_now(format="%d %B %Y")',
        "strftime_now(date_format or '%d %B %Y')",
        "'%02d ' % (strftime_now('%-d') | int) + strftime_now('%B ' + '%Y')",
    ],
)
def test_however_a_template_asks_for_the_date(call: str) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "\n{% macro now() %}{{ " + call + " }}{% endmacro %}{{ now() }}"
    tokenizer.chat_template += "{{ messages[0].content }}"
    date = datetime.date(2025, 2, 9)
    text = ChatTemplate(tokenizer, date=date).render([USER], ask=True)
    assert text == f"\n09 February 2025{USER['content']}"


def test_a_tokenizer_with_several_templates() -> None:
    several = qwen3()
    several.chat_template = {"default": chatml().chat_template, "tool_use": several.chat_template}
    template = ChatTemplate(several)
    assert "# Tools" in template.render([USER], ask=True, options={"tools": [TOOL]})
    with pytest.raises(TemplateError, match="renders no tool calls"):
        template.render([USER, CALLS], ask=False)
    several.chat_template = {"rag": "x"}
    with pytest.raises(TemplateError, match="no default"):
        ChatTemplate(several).render([USER], ask=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<|Assistant|><think>\n", ("<think>\n", "</think>")),
        ("assistant\n<seed:think>", ("<seed:think>", "</seed:think>")),
        ("[THINK]", ("[THINK]", "[/THINK]")),
        ("<|START_THINKING|>", ("<|START_THINKING|>", "<|END_THINKING|>")),
        ("<think>\n\n</think>\n\n", None),
        ("<|im_start|>assistant\n", None),
        ("<|START_OF_TURN_TOKEN|>", None),
        ("I <think> so", None),
    ],
)
def test_a_thought_that_is_open_at_the_end(text, found) -> None:
    assert opened_thought(text) == found

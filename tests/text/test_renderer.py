"""Prompts and responses as token ids: what is read, what is scored, what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from templates import (
    BY_KEY,
    IN_CONTENT,
    TEMPLATES,
    appends_eos,
    chatml,
    gemma,
    gptoss,
    llama3,
    mistral,
    opening,
    phi3,
    qwen3,
    r1,
    sentencepiece_tokenizer,
)
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import TemplateError

END = "<|im_end|>"
CHAT = [{"role": "user", "content": "abc"}]
ASKED = f"<|im_start|>user\nabc{END}\n<|im_start|>assistant\n"
EVERY = sorted(TEMPLATES)


def shown(renderer: Renderer, ids: Sequence[int]) -> str:
    return str(renderer.tokenizer.decode(ids))


def says(*texts: str, **keys: Any) -> list[dict[str, Any]]:
    """Turns of the assistant's, with the user's between them."""
    turns: list[dict[str, Any]] = []
    for text in texts:
        turns += [{"role": "assistant", "content": text, **keys}, *CHAT]
    return turns[:-1]


def learned(renderer: Renderer, prompt: Any, answer: Any, **options: Any) -> list[str]:
    """Each sequence, with what is learned in brackets."""
    found = []
    for ids, trained in renderer.learned(prompt, answer, options):
        text, start = "", 0
        for place in range(1, len(ids) + 1):
            if place == len(ids) or trained[place] != trained[start]:
                piece = shown(renderer, ids[start:place])
                text += f"[{piece}]" if trained[start] else piece
                start = place
        found.append(text)
    return found


# Prompts


@pytest.mark.parametrize("make", [chatml, llama3, mistral, sentencepiece_tokenizer])
def test_a_text_prompt_begins_as_the_tokenizer_begins_and_does_not_end(make) -> None:
    """Tokenizers that append an EOS (add_eos_token) would ask the model to go on behind its end."""
    plain, appending = make(), appends_eos(make())
    assert appending("ab")["input_ids"][-1] == plain.eos_token_id
    ids = Renderer(appending).prompt("ab")
    assert ids == Renderer(plain).prompt("ab") == plain("ab")["input_ids"]
    if plain.bos_token:
        assert ids[0] == plain.bos_token_id
        # A text that a template has rendered already brings its own.
        assert Renderer(plain).prompt(f"{plain.bos_token}ab").count(plain.bos_token_id) == 1


def test_what_a_text_prompt_ends_with_itself_stays() -> None:
    renderer = Renderer(appends_eos(chatml()))
    assert shown(renderer, renderer.prompt(f"ab{END}")) == f"ab{END}"


@pytest.mark.parametrize("name", EVERY)
def test_a_chat_prompt_is_what_plain_transformers_renders(name) -> None:
    tokenizer = TEMPLATES[name]()
    plain = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert Renderer(tokenizer).prompt(CHAT) == plain


# Ends


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (chatml, [END]),
        (gemma, ["<eos>", "<end_of_turn>"]),  # the turn's end is not the tokenizer's EOS
        (phi3, ["<|endoftext|>", "<|end|>"]),
        (gptoss, ["<|return|>"]),
        (mistral, ["</s>"]),
    ],
)
def test_an_answer_ends_where_its_template_ends_it(make, ends) -> None:
    tokenizer = make()
    assert Renderer(tokenizer).end_ids == sorted(tokenizer.convert_tokens_to_ids(ends))
    assert Renderer(tokenizer, end_ids=[7]).end_ids[0] == 7


# What a response says


@pytest.mark.parametrize(
    ("make", "answer", "words"),
    [
        (chatml, f"a<|im_start|>b{END}", "a<|im_start|>b"),
        (chatml, "a<|pad|>b", "ab"),
        (gemma, "a<end_of_turn>", "a"),
        (gemma, "a<eos>", "a"),
        (qwen3, f"<think>\nt\n</think>\n\na{END}", "<think>\nt\n</think>\n\na"),
        (qwen3, f'<tool_call>\n{{"name": "f"}}\n</tool_call>{END}', None),
        (r1, "t\n</think>\n\na<|end_of_sentence|>", "<think>\nt\n</think>\n\na"),
        (gptoss, "<|channel|>final<|message|>a<|return|>", "<|channel|>final<|message|>a"),
        (r1, "cut off", "<think>\ncut off"),
        (r1, "", "<think>\n"),
    ],
)
def test_words_keep_what_means_something_and_what_the_prompt_opened(make, answer, words) -> None:
    renderer = Renderer(make())
    ids = renderer.tokenizer(answer, add_special_tokens=False)["input_ids"]
    expected = answer.removesuffix(END) if words is None else words
    assert renderer.said(CHAT, renderer.prompt(CHAT), ids) == expected
    # What a text ends with is the text's.
    plain = renderer.said("a <think>\n", renderer.prompt("a <think>\n"), ids)
    assert plain == expected.removeprefix("<think>\n" if make is r1 else "")


@pytest.mark.parametrize(
    ("opening", "said"),
    [("<scratchpad>\n", "<scratchpad>\nx"), ("Okay, ", "Okay, x"), ("<t>\n</t>\n", "x")],
)
def test_words_have_whatever_the_prompt_opened(opening, said) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif", f"assistant\n{opening}"
        "{{ '' }}{% endif")  # fmt: skip
    renderer = Renderer(tokenizer)
    ids = tokenizer("x<|im_end|>")["input_ids"]
    assert renderer.said(CHAT, renderer.prompt(CHAT), ids) == said


def test_a_sentence_piece_reply_has_no_space_of_its_own() -> None:
    renderer = Renderer(sentencepiece_tokenizer())
    ids = renderer.reply("Q", "ab c", renderer.tokenizer.eos_token_id)
    assert renderer.tokenizer.convert_ids_to_tokens(ids) == ["a", "b", "▁", "c"]


# What is scored


@pytest.mark.parametrize(
    ("prompt", "limit", "finished", "expected"),
    [
        ("abcdef", 10, True, f"abcdefxyz{END}"),  # it fits exactly
        ("abcdef", 7, True, f"defxyz{END}"),  # the prompt's start goes
        ("abcdef", 7, False, "cdefxyz"),  # an unfinished response has no end
        ("abcdef", 5, True, f"fxyz{END}"),
        ("abcdef", 4, True, f"xyz{END}"),  # no room for the prompt
        ("abcdef", 2, True, "xy"),  # the response's end goes
        (CHAT, 99, True, f"{ASKED}xyz{END}\n"),
        (CHAT, 99, False, f"{ASKED}xyz"),
        (CHAT, 10, True, f"tant\nxyz{END}\n"),
    ],
)
def test_a_dialogue_loses_its_prompts_start_first(prompt, limit, finished, expected) -> None:
    renderer = Renderer(chatml())
    ids = renderer.scored(prompt, "xyz", max_tokens=limit, finished=finished)
    assert shown(renderer, ids) == expected


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("answer", ["xyz", "<think>\nt\n</think>\n\nxyz"])
def test_the_scored_tokens_are_those_of_the_rendered_chat(name, answer) -> None:
    """As public reward models read them, and whoever wrote them: text, or the policy's tokens."""
    tokenizer = TEMPLATES[name]()
    renderer = Renderer(tokenizer)
    plain = tokenizer.apply_chat_template([*CHAT, *says(answer)])["input_ids"]
    assert renderer.scored(CHAT, answer, max_tokens=999) == plain
    assert renderer.scored(CHAT, says(answer), max_tokens=999) == plain
    # As the policy writes it, from where it is asked to, with any of its ends.
    asked = renderer.prompt(CHAT)
    [(whole, trained)] = renderer.learned(CHAT, says(answer))
    wrote = [token for token, own in zip(whole, trained, strict=True) if own][:-1]
    text = renderer.said(CHAT, asked, wrote)
    if name == "r1":  # what stands behind a thought is kept, white space too
        plain = tokenizer.apply_chat_template([*CHAT, *says(text)])["input_ids"]
    for end in renderer.end_ids:
        written = (asked, [*wrote, end])
        assert renderer.said(CHAT, *written) == text
        assert renderer.scored(CHAT, text, max_tokens=999, written=written) == plain


def test_the_policys_own_tokens_are_read_where_they_spell_the_same() -> None:
    """Another division into tokens than the tokenizer's stays; other words are read as text."""
    renderer = Renderer(gemma())
    renderer.tokenizer.add_tokens(["xyz"])
    letters = [renderer.tokenizer.convert_tokens_to_ids(letter) for letter in "xyz"]
    asked = renderer.prompt(CHAT)
    ids = renderer.scored(CHAT, "xyz", max_tokens=999, written=(asked, letters), finished=False)
    assert ids == [*asked, *letters]
    # Without the policy's end: the template's takes its place.
    finished = (asked, [*letters, renderer.tokenizer.eos_token_id])
    ids = renderer.scored(CHAT, "xyz", max_tokens=999, written=finished)
    assert shown(renderer, ids[: len(asked) + 4]).endswith("xyz<end_of_turn>")
    assert ids[: len(asked) + 3] == [*asked, *letters]
    ids = renderer.scored(CHAT, "xyz", max_tokens=999, finished=False)
    assert ids == [*asked, renderer.tokenizer.convert_tokens_to_ids("xyz")]
    spaced = renderer.tokenizer(" xyz ")["input_ids"][1:]
    ids = renderer.scored(CHAT, " xyz ", max_tokens=999, written=(asked, spaced), finished=False)
    assert shown(renderer, ids[len(asked) :]) == "xyz"  # the template trims it


@pytest.mark.parametrize("prompt", ["Q:", CHAT])
def test_an_end_that_only_the_policy_declares_is_not_scored(prompt: Any) -> None:
    tokenizer = gemma()
    tokenizer.add_tokens(["xyz"])
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "xyz"]
    declared = tokenizer.convert_tokens_to_ids("a")
    policy = Renderer(tokenizer, end_ids=[declared])
    written = policy.prompt(prompt), [*letters, declared]
    ids = policy.of(tokenizer).scored(prompt, "xyz", max_tokens=999, written=written)
    assert ids[: len(written[0]) + 3] == [*written[0], *letters]
    assert shown(policy, ids).count("a") == shown(policy, written[0]).count("a")


@pytest.mark.parametrize("prompt", ["Q:", CHAT])
def test_a_stop_is_part_of_what_is_scored(prompt: Any) -> None:
    renderer = Renderer(gemma())
    renderer.tokenizer.add_tokens(["xyz"])  # so that the letters are no division of its own
    letters = [renderer.tokenizer.convert_tokens_to_ids(letter) for letter in "xyz"]
    written = renderer.prompt(prompt), letters
    assert renderer.said(prompt, *written) == "xyz"
    ids = renderer.scored(prompt, "xyz", max_tokens=999, written=written)
    assert ids[: len(written[0]) + 3] == [*written[0], *letters]
    assert len(ids) > len(written[0]) + 3  # and then the end of an answer


def test_a_stop_behind_an_end_within_is_part_of_what_is_scored() -> None:
    """An earlier turn's end, or a padding token: neither is in the text."""
    renderer = Renderer(gemma())
    letters = [renderer.tokenizer.convert_tokens_to_ids(letter) for letter in "xyz"]
    for inside in (renderer.end_ids[0], renderer.tokenizer.pad_token_id):
        read, said = renderer.prompt("Q:"), [letters[0], inside, *letters]
        ids = renderer.scored("Q:", "xxyz", max_tokens=999, written=(read, said))
        assert ids == [*read, *said, renderer.tokenizer.eos_token_id]
        ended = [*said, renderer.tokenizer.eos_token_id]
        assert renderer.scored("Q:", "xxyz", max_tokens=999, written=(read, ended)) == ids


def test_a_rewritten_chat_that_is_too_long_loses_its_start() -> None:
    renderer = Renderer(r1())
    ids = renderer.scored(CHAT, "<think>\nt</think>xyz", max_tokens=5)
    assert shown(renderer, ids).endswith("xyz<|end_of_sentence|>") and len(ids) == 5


@pytest.mark.parametrize("thought", [IN_CONTENT, BY_KEY])
def test_a_thought_that_the_prompt_has_opened(thought: str) -> None:
    """It is scored and learned, once, however the template finds it."""
    renderer = Renderer(opening(thought))
    asked = renderer.prompt(CHAT)
    wrote = renderer.tokenizer("hm\n</think>\n\nxyz")["input_ids"]
    text = renderer.said(CHAT, asked, wrote)
    assert text == "<think>\nhm\n</think>\n\nxyz"
    whole = f"{ASKED}<think>\nhm\n</think>\n\nxyz{END}\n"
    ids = renderer.scored(CHAT, text, max_tokens=999, written=(asked, wrote))
    assert shown(renderer, ids) == whole and ids[: len(asked) + len(wrote)] == [*asked, *wrote]
    assert shown(renderer, renderer.scored(CHAT, text, max_tokens=999)) == whole
    bare = shown(renderer, renderer.scored(CHAT, "xyz", max_tokens=999))
    assert bare == whole.replace("hm", "")
    for message in (*says(text), *says("xyz", reasoning_content="hm")):
        if thought == BY_KEY or "reasoning_content" not in message:
            [found] = learned(renderer, CHAT, [message])
            assert found == f"{ASKED}<think>\n[hm\n</think>\n\nxyz{END}]"


@pytest.mark.parametrize("make", [opening, qwen3, gptoss])
@pytest.mark.parametrize("turns", [1, 2])
def test_an_answer_that_is_cut_off_in_its_thought_is_scored_as_it_was_written(make, turns) -> None:
    renderer = Renderer(make())
    start = {opening: "", qwen3: "<think>\n", gptoss: "<|channel|>analysis<|message|>"}[make]
    if make is gptoss:  # as the family's own does with what it did not write itself
        source = str(renderer.tokenizer.chat_template)
        refusal = "{% for m in messages if '<|channel|>' in m.content %}{{ raise_exception() }}"
        renderer.tokenizer.chat_template = refusal + "{% endfor %}" + source
    chat = [*CHAT, *says("xyz"), *CHAT] if turns == 2 else CHAT
    asked = renderer.prompt(chat)
    wrote = renderer.tokenizer(f"{start}hm and", add_special_tokens=False)["input_ids"]
    text = renderer.said(chat, asked, wrote)
    if turns == 2:
        answer = [*chat[1:], {"role": "assistant", "content": text}]
        assert renderer.scored(CHAT, answer, max_tokens=999, finished=False) == [*asked, *wrote]
        return
    for written in (None, (asked, wrote)):
        ids = renderer.scored(CHAT, text, max_tokens=999, finished=False, written=written)
        assert ids == [*asked, *wrote]
    assert renderer.scored(CHAT, text, max_tokens=5, finished=False) == wrote[:5]
    if make is gptoss:
        with pytest.raises(TemplateError, match="refused"):
            renderer.scored(CHAT, text, max_tokens=999)


def test_a_thought_that_the_template_leaves_out_is_not_learned() -> None:
    """Such as one that it shows beside calls of tools only."""
    drops = chatml()
    drops.chat_template = CHAT_TEMPLATE + "{% if messages[0].reasoning_content %}{% endif %}"
    answer = says("xyz", reasoning_content="hm hm")
    with pytest.raises(TemplateError, match="leaves out the thought of this answer"):
        learned(Renderer(drops), CHAT, answer)
    [found] = learned(Renderer(drops), CHAT, [{**answer[0], "train": False}, *CHAT, *says("x")])
    assert found.endswith(f"[x{END}]")


def test_an_answer_that_leaves_its_thought_open_is_not_learned() -> None:
    renderer = Renderer(r1())
    for content in ("<think>\nhm", " <think>hm, 4"):
        with pytest.raises(TemplateError, match="has a thought that no '</think>' closes"):
            renderer.learned(CHAT, says(content))


def test_a_template_without_an_end_is_ended_by_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    renderer = Renderer(tokenizer)
    assert shown(renderer, renderer.scored(CHAT, "x", max_tokens=99)) == f"abc\nx\n{END}"
    assert learned(renderer, CHAT, says("x")) == [f"abc\n[x\n{END}]"]


def test_a_template_that_refuses_everything_ends_nothing() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert Renderer(tokenizer).end_ids == [tokenizer.eos_token_id]
    with pytest.raises(TemplateError, match="never"):
        Renderer(tokenizer).prompt(CHAT)


def test_a_call_of_a_tool_may_end_otherwise() -> None:
    renderer = Renderer(gptoss())
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    text = shown(renderer, renderer.scored(CHAT, turns, max_tokens=999))
    assert text.endswith("<|message|>{}<|call|>")


# What is learned


@pytest.mark.parametrize(
    ("make", "texts", "expected"),
    [
        (chatml, ["x"], [f"{ASKED}[x{END}]"]),
        (chatml, ["x", "y"], [f"{ASKED}[x{END}]\n{ASKED}[y{END}]"]),
        (chatml, [f"a{END}b"], [f"{ASKED}[a{END}b{END}]"]),  # it holds an end itself
        (
            gemma,
            ["x"],
            ["<bos><start_of_turn>user\nabc<end_of_turn>\n<start_of_turn>model\n[x<end_of_turn>]"],
        ),
        # Not the second end, which the template writes behind a whole conversation.
        (phi3, ["x"], ["<|user|>\nabc<|end|>\n<|assistant|>\n[x<|end|>]"]),
        (
            phi3,
            ["x", "y"],
            [
                "<|user|>\nabc<|end|>\n<|assistant|>\n[x<|end|>]"
                "\n<|user|>\nabc<|end|>\n<|assistant|>\n[y<|end|>]"
            ],
        ),
        (mistral, ["x", "y"], ["<s>[INST] abc [/INST][ x</s>][INST] abc [/INST][ y</s>]"]),
        # A thought that the prompt has opened is written once, and closed.
        (r1, ["x"], ["{r1}[\n</think>\n\nx<|end_of_sentence|>]"]),
        (r1, ["<think>\nt\n</think>\n\nx"], ["{r1}[t\n</think>\n\nx<|end_of_sentence|>]"]),
        (r1, ["t</think>x"], ["{r1}[t</think>x<|end_of_sentence|>]"]),
        # An answer that later ones do not see as it was is an example of its own.
        (
            r1,
            ["t</think>x", "u</think>y"],
            [
                "{r1}[t</think>x<|end_of_sentence|>]",
                "<|begin_of_sentence|><|User|>abc<|Assistant|>x<|end_of_sentence|><|User|>abc"
                "<|Assistant|><think>\n[u</think>y<|end_of_sentence|>]",
            ],
        ),
    ],
)
def test_an_answer_is_learned_up_to_its_end(make, texts, expected) -> None:
    """And nothing of what the template writes behind it."""
    opened = "<|begin_of_sentence|><|User|>abc<|Assistant|><think>\n"
    found = learned(Renderer(make()), CHAT, says(*texts))
    assert found == [text.replace("{r1}", opened) for text in expected]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (r1, "<|Assistant|><think>\n[hm\n</think>\n\nx<|end_of_sentence|>]"),
        (qwen3, f"assistant\n[<think>\nhm\n</think>\n\nx{END}]"),
        (gptoss, "assistant[<|channel|>analysis<|message|>hm<|end|><|start|>assistant"),
    ],
)
def test_a_thought_beside_the_content_is_learned(make, expected) -> None:
    [found] = learned(Renderer(make()), CHAT, says("x", reasoning_content="hm"))
    assert expected in found


def test_only_the_messages_that_are_to_be_learned_are() -> None:
    renderer = Renderer(chatml())
    turns = says("x", "y", "z")
    turns[0]["train"] = turns[4]["train"] = False
    asked = f"\n{ASKED}"
    assert learned(renderer, CHAT, turns) == [f"{ASKED}x{END}{asked}[y{END}]{asked}z{END}"]
    assert learned(renderer, CHAT, says("x", train=False)) == []


def test_answers_stand_behind_the_tokens_that_inference_reads() -> None:
    """SentencePiece puts a space before any text that it is given alone."""
    tokenizer = sentencepiece_tokenizer()
    renderer = Renderer(tokenizer)
    [(ids, trained)] = renderer.learned(CHAT, says("x", "y"))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    own = [p for p, learns in zip(pieces, trained, strict=True) if learns]
    assert own == ["▁", "x", "</s>", "▁", "y", "</s>"]
    later = [*CHAT, *says("x"), *CHAT]
    asked = tokenizer.apply_chat_template(later, add_generation_prompt=True)["input_ids"]
    assert ids[: len(asked)] == asked == renderer.prompt(later)
    # A text's answer continues it as well.
    [(ids, trained)] = renderer.learned("Q:", " x")
    assert tokenizer.convert_ids_to_tokens(ids[4:]) == ["▁", "x", "</s>"]
    assert shown(renderer, renderer.scored("Q:", "x", max_tokens=9)) == "<s> Q:x</s>"
    # And is said with its space: a reward, or a file of responses, has the two as one text.
    read, wrote = ids[:4], ids[4:]
    assert renderer.said("Q:", read, wrote) == " x"
    assert renderer.scored("Q:", " x", max_tokens=9, written=(read, wrote)) == ids
    assert renderer.scored("Q:", renderer.said("Q:", read, wrote), max_tokens=9) == ids


def test_an_answer_that_cannot_be_asked_for_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif", "bot\n{% endif")
    with pytest.raises(TemplateError, match="otherwise than it asks for it"):
        Renderer(tokenizer).learned(CHAT, says("x"))


def test_options_reach_every_rendering() -> None:
    renderer = Renderer(qwen3(), arguments={"enable_thinking": False})
    empty = "<think>\n\n</think>\n\n"
    assert shown(renderer, renderer.prompt(CHAT)).endswith(empty)
    assert shown(renderer, renderer.prompt(CHAT, {"enable_thinking": True})).endswith("assistant\n")
    [text] = learned(renderer, CHAT, says("x"))
    assert text.endswith(f"{empty}[x{END}]")
    [text] = learned(renderer, CHAT, says("x"), enable_thinking=True)
    assert text.endswith(f"[{empty}x{END}]")
    reply = renderer.reply(CHAT, "more", renderer.tokenizer.eos_token_id)
    assert shown(renderer, reply) == f"\n{ASKED}{empty}".replace("abc", "more")
    # Another tokenizer's template gets those that it knows.
    other = renderer.of(chatml())
    assert shown(other, other.prompt(CHAT)) == ASKED
    assert renderer.of(qwen3()).prompt(CHAT) == renderer.prompt(CHAT)

"""The usual names of columns: the same prompt, whichever of them a row has, for every command."""

from __future__ import annotations

from typing import Any

import pytest
from data_files import BLUE, RED, USER
from templates import gemma
from tiny import tiny_tokenizer

from ppo_engine.data.demonstrations import Demonstration, load_demonstrations
from ppo_engine.data.preferences import Ranking, load_preferences
from ppo_engine.data.prompts import load_prompts, prompts_from_sequence
from ppo_engine.data.rows import SkippedLines
from ppo_engine.errors import UserError

CHAT = tiny_tokenizer()
TEXT = tiny_tokenizer(chat_template=False)
CAT = "Translate: cat"
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"chosen": "chat", "rejected": "chien"}
DIALOGUE = "\n\nHuman: Name a color.\n\nAssistant:"
HUMAN, GPT = {"from": "human", "value": "Name a color."}, {"from": "gpt", "value": "Blue."}
TOOL = {"type": "function", "function": {"name": "now"}}
THINKING = {"enable_thinking": False}


def read(row: dict[str, Any], tokenizer: Any = CHAT, **settings: Any) -> list[tuple[Any, Any]]:
    """The row's prompt and options as prompts, preferences and examples have them."""
    settings |= {"tokenizer": tokenizer}
    [asked], _ = prompts_from_sequence([row], **settings)
    [ranking], _ = load_preferences([row | PAIR], **settings)
    [example], _ = load_demonstrations([row | {"response": "chat"}], **settings)
    options = {**{"tools": asked.columns.get("tools")}, **asked.columns.get(KWARGS, {})}
    options = {name: value for name, value in options.items() if value is not None}
    return [(asked.prompt, options), (ranking.prompt, ranking.options),
            (example.prompt, example.options)]  # fmt: skip


KWARGS = "chat_template_kwargs"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": CAT}, CAT),
        ({"instruction": CAT}, CAT),
        ({"instruction": CAT, "input": ""}, CAT),
        ({"instruction": "Translate:", "input": "cat"}, "Translate:\n\ncat"),
        ({"instruction": "Translate:", "context": "cat"}, "Translate:\n\ncat"),
        ({"question": CAT}, CAT),
        ({"query": CAT}, CAT),
        ({"problem": CAT}, CAT),
        ({"request": CAT}, CAT),
        ({"input": CAT}, CAT),
        ({"prompt": None, "question": CAT}, CAT),  # columns of a data set
        ({"prompt": CAT, "question": "Another?"}, CAT),
        ({"messages": [USER]}, [USER]),
        ({"conversations": [HUMAN]}, [USER]),
        ({"conversation": [HUMAN]}, [USER]),
        ({"prompt": USER}, [USER]),
        ({"prompt": "Name a color.", "system": "Be brief."}, [SYSTEM, USER]),
        ({"prompt": [USER], "system_prompt": "Be brief."}, [SYSTEM, USER]),
        ({"prompt": [USER], "system_message": "Be brief."}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER], "system": "Be brief."}, [SYSTEM, USER]),  # said twice
        ({"prompt": [USER], "system": ""}, [USER]),
        ({"prompt": DIALOGUE}, [USER]),
        ({"prompt": DIALOGUE, "system": "Be brief."}, [SYSTEM, USER]),
        ({"query": "Name a color.", "history": [["Hi", "Blue."]], "system": "Be brief."},
         [SYSTEM, {"role": "user", "content": "Hi"}, BLUE, USER]),
        ({"prompt": [USER], "history": [USER, BLUE]}, [USER, BLUE, USER]),
        ({"prompt": [USER, BLUE, USER], "history": [USER, BLUE]}, [USER, BLUE, USER]),
        ({"prompt": CAT, "history": []}, CAT),
    ],
)  # fmt: skip
def test_every_name_of_a_prompt(row: dict[str, Any], prompt: Any) -> None:
    assert read(row) == [(prompt, {})] * 3


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"functions": '[{"name": "now"}]'}, {"tools": [TOOL]}),
        ({KWARGS: THINKING}, THINKING),
        ({"tools": [TOOL], KWARGS: THINKING}, {"tools": [TOOL], **THINKING}),
        ({"tools": [], KWARGS: None}, {}),
    ],
)
def test_what_a_row_hands_to_the_template(more: dict[str, Any], options: dict[str, Any]) -> None:
    assert read({"prompt": [USER], **more}) == [([USER], options)] * 3
    # It can be told in a chat only: text becomes one.
    prompt = [USER] if options else "Name a color."
    assert read({"prompt": "Name a color.", **more}) == [(prompt, options)] * 3


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"ask": CAT}, r"no column 'prompt' \(columns: 'ask'.*\); a prompt is named prompt, instr"),
        ({"question": " "}, "empty prompt"),
        ({"instruction": "", "input": " "}, "empty prompt"),
        ({"instruction": CAT, "input": 3}, "'input' must be text, not int"),
        ({"messages": "Hi"}, "'messages' must be chat messages, not text"),
        ({"conversations": []}, "'conversations' is an empty list of messages"),
        ({"prompt": CAT, "system": 3}, "'system' must be text, not int"),
        ({"prompt": [SYSTEM, USER], "system": "Be long."}, "'system' .* two different system mess"),
        ({"prompt": CAT, "history": [["Hi"]]}, "'history' has a message without"),
        ({"prompt": CAT, "history": [["Hi", None]]}, "'history' must be text, not null"),
        ({"prompt": CAT, "tools": "hammer"}, "'tools' is text, but not JSON"),
        ({"prompt": CAT, KWARGS: {"tokenize": True}}, "'chat_template_kwargs' must not set 'token"),
    ],
)
def test_prompts_that_no_loader_takes(row: dict[str, Any], problem: str) -> None:
    for load, more in (
        (load_demonstrations, {"response": "chat"}),
        (load_preferences, {"responses": ["chat", "chien"], "ranks": [1, 2]}),
        (prompts_from_sequence, {}),
    ):
        with pytest.raises(UserError, match=rf"\[0\]: .*{problem}"):
            load([row | more], tokenizer=CHAT)


@pytest.mark.parametrize(
    "more",
    [{"system": "Be brief."}, {"history": [["a", "b"]]}, {"tools": [TOOL]}, {KWARGS: THINKING}],
)
def test_what_needs_a_chat_template(more: dict[str, Any]) -> None:
    [name] = more
    with pytest.raises(UserError, match=f"'{name}' needs a chat template, which the tokenizer"):
        prompts_from_sequence([{"prompt": CAT, **more}], tokenizer=TEXT)


def test_text_as_a_chat() -> None:
    asked = [{"role": "user", "content": CAT}]
    assert read({"instruction": CAT}, as_chat=True) == [(asked, {})] * 3
    [example], _ = load_demonstrations(
        [{"question": "Name a color.", "answer": "Blue."}], tokenizer=CHAT, as_chat=True
    )
    assert example == Demonstration([USER], [BLUE], "demonstrations[0]")
    with pytest.raises(UserError, match=r"data\.as_chat=true needs a chat template"):
        load_prompts("absent.jsonl", tokenizer=TEXT, as_chat=True)
    texts = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    for more, settings in (({}, {"as_chat": True}), ({"system": "Be brief."}, {})):
        with pytest.raises(UserError, match="no prompt: whole texts cannot be chat messages"):
            load_preferences([texts | more], tokenizer=CHAT, **settings)


def test_a_system_prompt_for_all_chats_that_have_none() -> None:
    told = {"system_prompt": "Be brief."}
    asked = [SYSTEM, {"role": "user", "content": CAT}]
    for row in ({"prompt": CAT}, {"messages": asked[1:]}, {"messages": asked}):
        assert read(row, **told) == [(asked, {})] * 3
    own, developer = ({"role": r, "content": "Be long."} for r in ("system", "developer"))
    for first, row in (
        (own, {"prompt": CAT, "system": "Be long."}),
        (own, {"prompt": CAT, "history": [own]}),
        (own, {"messages": [own, asked[1]]}),
        (developer, {"messages": [developer, asked[1]]}),
    ):
        assert read(row, **told) == [([first, asked[1]], {})] * 3


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (TEXT, r"data\.system_prompt needs a chat template"),
        (gemma(), r"data\.system_prompt: the chat template .* takes no system message"),
    ],
)
def test_a_template_without_a_system_message(tokenizer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompts_from_sequence([CAT], tokenizer=tokenizer, system_prompt="Be brief.")


# Responses


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen_response": "chat", "rejected_response": "chien"}, ("chat", "chien")),
        ({"response": "chat", "rejected_response": "chien"}, ("chat", "chien")),
        ({"response_chosen": "chat", "response_rejected": "chien"}, ("chat", "chien")),
        ({"preferred": "chat", "dispreferred": "chien"}, ("chat", "chien")),
        ({"accepted": "chat", "rejected": "chien"}, ("chat", "chien")),
        ({"better": "chat", "worse": "chien"}, ("chat", "chien")),
        ({"response_0": "chien", "response_1": "chat", "better_response_id": 1}, ("chat", "chien")),
        ({"response_0": "chat", "response_1": "chien", "better_response_id": 0}, ("chat", "chien")),
        ({"chosen": GPT, "rejected": RED}, ("Blue.", "Red.")),
    ],
)  # fmt: skip
def test_every_name_of_a_pair(row: dict[str, Any], expected: tuple[str, str]) -> None:
    [found], report = load_preferences([{"conversations": [HUMAN], **row}], tokenizer=CHAT)
    assert found == Ranking([USER], expected, (0, 1)) and not report.unread


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": CAT, "completion": "chat", "label": True}, "'label' judges one response alone"),
        ({"response_0": "a", "response_1": "b", "better_response_id": 2}, "must be 0 or 1, not 2"),
        ({"response_0": "a", "better_response_id": 0}, "no column 'response_1'"),
        ({"prompt": CAT, "preferred": "chat"}, r"no column 'dispreferred' .*; name two responses"),
        (
            {"prompt": CAT, "response_a": "a", "response_b": "b"},
            "no column 'chosen' .*'response_a'",
        ),
        ({"responses": ["a", "b"], "prompt": CAT}, "no column 'ranks'"),
        (
            {"prompt": "Else?", "chosen": [USER, BLUE], "rejected": [USER, RED]},
            "the prompt is not among the messages that chosen and rejected share",
        ),
    ],
)
def test_preferences_that_are_not_clear(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_preferences([row], tokenizer=CHAT)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, BLUE], "rejected": [USER, RED]},
        {"chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, RED]},
        {"prompt": "Name a color.", "chosen": [BLUE], "rejected": [RED]},
        {"prompt": "Name a color.", "chosen": [USER, BLUE], "rejected": [USER, RED]},
        {"prompt": [SYSTEM, USER], "chosen": [USER, BLUE], "rejected": [USER, RED]},
        {"chosen": f"{DIALOGUE} Blue.", "rejected": f"{DIALOGUE} Red."},
        {"prompt": DIALOGUE, "chosen": "Blue.", "rejected": "Red."},
        {"question": "Name a color.", "responses": ["Red.", "Blue."], "ranks": [2, 1]},
    ],
)
def test_a_system_message_beside_every_form_of_preferences(row: dict[str, Any]) -> None:
    [found], _ = load_preferences([row | {"system": "Be brief."}], tokenizer=CHAT)
    assert found == Ranking([SYSTEM, USER], ("Blue.", "Red."), (0, 1))


def test_responses_that_are_more_than_their_content() -> None:
    thought = BLUE | {"reasoning_content": "Sky?"}
    call = {"role": "assistant", "content": "", "tool_calls": [{**TOOL}]}
    call["tool_calls"] = [{"type": "function", "function": {"name": "now", "arguments": {}}}]
    for chosen, rejected, expected in (
        ([USER, thought], [USER, RED], (thought, "Red.")),
        ([call], [RED | {"train": True}], (call, "Red.")),
        ([BLUE | {"weight": 1}], [thought], ("Blue.", thought)),
    ):
        row = {"prompt": [USER], "chosen": chosen, "rejected": rejected}
        assert load_preferences([row], tokenizer=CHAT)[0] == [Ranking([USER], expected, (0, 1))]
    ranked = {"prompt": [USER], "responses": [thought, [RED], "Green."], "ranks": [1, 2, 3]}
    [found], _ = load_preferences([ranked], tokenizer=CHAT)
    assert found.responses == (thought, "Red.", "Green.")
    twice = ranked | {"responses": [thought, thought, "x"]}
    [found], _ = load_preferences([twice], tokenizer=CHAT)
    assert found.responses == (thought, "x")
    with pytest.raises(UserError, match="not one message of the assistant's"):
        load_preferences([ranked | {"responses": [[USER], [RED], "x"]}], tokenizer=CHAT)


@pytest.mark.parametrize(
    "name",
    ["response", "completion", "output", "solution", "answer", "reply", "target", "generation"],
)
def test_every_name_of_a_response(name: str) -> None:
    row = {"question": "Name a color.", name: "Blue.", "other": None}
    [found], report = load_demonstrations([row], tokenizer=CHAT)
    assert (found.prompt, found.response) == ("Name a color.", "Blue.") and not report.unread


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"conversations": [HUMAN, GPT]}, [USER], [BLUE]),
        ({"messages": [USER, BLUE], "prompt": "x", "response": "y"}, [USER], [BLUE]),
        ({"conversations": [USER, RED], "prompt": "Q", "answer": "A"}, "Q", "A"),
        ({"messages": [USER, BLUE, USER], "response": "Red."}, [USER, BLUE, USER], [RED]),
        ({"conversations": [HUMAN, GPT], "system": "Be brief."}, [SYSTEM, USER], [BLUE]),
        ({"messages": [USER, BLUE | {"weight": 0}, USER, RED]}, [USER],
         [BLUE | {"train": False}, USER, RED]),
        ({"messages": [USER, BLUE | {"content": None, "reasoning": "Sky?"}]}, [USER],
         [BLUE | {"content": "", "reasoning": "Sky?"}]),
    ],
)  # fmt: skip
def test_conversations_and_what_is_beside_them(
    row: dict[str, Any], prompt: Any, response: Any
) -> None:
    [found], _ = load_demonstrations([row], tokenizer=CHAT)
    assert (found.prompt, found.response) == (prompt, response)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"prompt": CAT, "responses": ["a"]},
            "no column 'response' .* the one of 'responses' to l",
        ),
        ({"prompt": CAT, **PAIR}, "write the one of 'chosen' to learn as 'response'"),
        ({"text": "cat"}, "no column 'prompt'"),
        ({"messages": [USER, BLUE | {"train": False}]}, "no message is to be learned"),
        ({"messages": [USER, BLUE | {"content": ""}, USER, RED]}, "empty response"),
        ({"prompt": [USER, BLUE | {"train": True}, USER], "response": "Red."}, "give 'messages'"),
    ],
)
def test_examples_that_are_not_clear(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_demonstrations([row], tokenizer=CHAT)


def test_an_empty_message_that_is_not_learned() -> None:
    row = {"messages": [USER, BLUE | {"content": "", "train": False}, USER, RED]}
    assert len(load_demonstrations([row], tokenizer=CHAT)[0]) == 1


# What is not used


def test_a_conversation_as_a_prompt_is_cut_before_its_answer_and_says_so() -> None:
    rows = [
        {"messages": [USER, BLUE], "k": 1},
        {"conversations": [HUMAN, GPT, HUMAN, GPT]},
        {"messages": [USER]},
    ]
    found, report = prompts_from_sequence(rows, tokenizer=CHAT)
    assert [example.prompt for example in found] == [[USER], [USER, BLUE, USER], [USER]]
    assert found[0].columns == rows[0]  # rewards may want the answer
    assert report.notes("Prompts", lambda column: True) == [
        "Prompts: the assistant's answer at a conversation's end is cut (2 rows)."
    ]
    with pytest.raises(UserError, match="no message but the assistant's"):
        prompts_from_sequence([{"messages": [BLUE]}], tokenizer=CHAT)


def notes(load: Any, *rows: dict[str, Any]) -> list[str]:
    report: SkippedLines = load(rows, tokenizer=CHAT)[1]
    return report.notes("Rows")


def test_columns_that_nothing_reads_are_named_once() -> None:
    unread = "Rows: nothing reads these columns: "
    row = {"prompt": CAT, **PAIR, "source": "x", "score_chosen": 0.5, "empty": "", "null": None}
    assert notes(load_preferences, row, {"prompt": CAT, **PAIR, "source": "x"}) == [
        f"{unread}'source' (2 rows), 'score_chosen' (1 row)."
    ]
    example = {"question": CAT, "answer": "chat", "input": "x"}
    assert notes(load_demonstrations, example) == [f"{unread}'input' (1 row)."]
    whole = {"chosen": [USER, BLUE], "rejected": [USER, RED], "messages": [USER, BLUE]}
    assert notes(load_preferences, whole) == [f"{unread}'messages' (1 row)."]
    assert notes(load_preferences, {"prompt": CAT, **PAIR, "margin": 1}) == []
    ranked = {"prompt": CAT, "responses": ["a", "b"], "ranks": [1, 2], "finished": [True, True]}
    assert notes(load_preferences, ranked) == []
    report = prompts_from_sequence([{"prompt": CAT, "a": 1, "b": 2}], tokenizer=CHAT)[1]
    assert report.notes("P", lambda column: column == "a") == [
        "P: nothing reads these columns: 'b' (1 row)."
    ]

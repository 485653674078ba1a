"""`data.columns`: the file's columns under the names that are read."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_tokenizer

from ppo_engine.data.demonstrations import load_demonstrations
from ppo_engine.data.preferences import load_preferences
from ppo_engine.data.prompts import prompts_from_sequence
from ppo_engine.errors import UserError

TEXT = tiny_tokenizer(chat_template=False)


def test_every_kind_of_data_has_its_columns_renamed() -> None:
    row = {"q": "Q", "x": "A", "y": "B", "gold": 4}
    [prompt], _ = prompts_from_sequence(
        [row], tokenizer=TEXT, columns={"prompt": "q", "answer": "gold"}
    )
    assert (prompt.prompt, prompt.columns) == ("Q", {"answer": 4, "x": "A", "y": "B"})
    names = {"prompt": "q", "response": "x"}
    [example], report = load_demonstrations([row], tokenizer=TEXT, columns=names)
    assert (example.prompt, example.response) == ("Q", "A")
    assert {*report.unread} == {"y", "gold"}
    names = {"prompt": "q", "chosen": "y", "rejected": "x", "margin": "gold"}
    [pair], _ = load_preferences([row], tokenizer=TEXT, columns=names)
    assert (pair.prompt, pair.responses, pair.margin) == ("Q", ("B", "A"), 4)


def test_columns_may_change_places_and_take_one_s_place() -> None:
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    [pair], report = load_preferences([row], tokenizer=TEXT, columns=swapped)
    assert pair.responses == ("B", "A") and not report.remarks
    [prompt], report = prompts_from_sequence([row], tokenizer=TEXT, columns={"prompt": "chosen"})
    assert prompt.prompt == "A" and prompt.columns == {"rejected": "B"}
    assert report.notes("Prompts", lambda column: True) == [
        "Prompts: 'chosen' takes the place of the column 'prompt' (data.columns) (1 row)."
    ]


@pytest.mark.parametrize(
    ("load", "columns", "message"),
    [
        (load_demonstrations, {"respnse": "a"}, "nothing reads a column 'respnse'. Did you mean "
         "'response'?"),
        (load_preferences, {"answer": "a"}, "nothing reads a column 'answer'."),
        (prompts_from_sequence, {"prompt": "qestion"}, "prompts[1]: no column 'qestion', of which "
         "data.columns makes 'prompt' (columns: 'question', 'a'). Did you mean 'question'?"),
        (prompts_from_sequence, {"prompt": "ask"}, "Fix it, or skip such lines"),
    ],
)  # fmt: skip
def test_names_that_are_not_there(load: Any, columns: dict[str, str], message: str) -> None:
    rows = [dict.fromkeys(columns.values(), "Q"), {"question": "Q", "a": "A"}]
    with pytest.raises(UserError) as caught:
        load(rows, tokenizer=TEXT, columns=columns)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("load", "row", "setting"),
    [
        (load_preferences, {"prompt": "Q", "responses": ["A", "B"], "rank": [0, 1]}, "ranks: rank"),
        (load_preferences, {"prompt": "Q", "chosen_": "A", "rejected": "B"}, "chosen: chosen_"),
        (load_demonstrations, {"prompt": "Q", "completions": "A"}, "response: completions"),
        (prompts_from_sequence, {"user_prompt": "Q", "prompts": 3}, "prompt: prompts"),
        (prompts_from_sequence, {"questions": "Q"}, "prompt: questions"),
        (prompts_from_sequence, {"ask": "Q"}, "prompt: NAME"),
        (load_preferences, {"better_response_id": 0, "response_0": "A"}, "response_1: NAME"),
    ],
)
def test_a_column_of_another_name_is_told_how_to_be_read(
    load: Any, row: dict[str, Any], setting: str
) -> None:
    with pytest.raises(UserError) as caught:
        load([row], tokenizer=TEXT)
    assert f"data.columns={{{setting}}}" in str(caught.value)
    name, _, source = setting.partition(": ")
    if source != "NAME" and row[source] != 3:
        load([row], tokenizer=TEXT, columns={name: source})


def test_a_row_without_a_renamed_column_can_be_skipped() -> None:
    rows = [{"q": "Q"}, {"prompt": "Q"}, "text"]
    found, report = prompts_from_sequence(
        rows, tokenizer=TEXT, columns={"prompt": "q"}, on_bad_line="skip"
    )
    assert [example.place for example in found] == ["prompts[0]"] and report.total == 2

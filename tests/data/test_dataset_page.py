"""Every row of docs/dataset.md becomes what the page says, or is the error that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from ppo_engine.data import forms
from ppo_engine.data.demonstrations import load_demonstrations
from ppo_engine.data.preferences import load_preferences
from ppo_engine.data.prompts import prompts_from_sequence
from ppo_engine.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "dataset.md"
TOKENIZER = tiny_tokenizer()


def rows() -> Iterator[tuple[str, str, str]]:
    """Each row of the page with its section, and with the line that follows it."""
    section, row = "", ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("{"):
            assert not row, f"nothing is said of {row}"
            row = line
        elif row:
            yield section, row, line
            row = ""


def read(section: str, row: dict[str, Any]) -> Any:
    if section == "Prompts":
        return prompts_from_sequence([row], tokenizer=TOKENIZER)[0][0].prompt
    if section == "Preferences":
        [ranking], report = load_preferences([row], tokenizer=TOKENIZER)
        assert not report.unread
        return [ranking.prompt, *ranking.responses]
    [example], report = load_demonstrations([row], tokenizer=TOKENIZER)
    assert not report.unread
    return [example.prompt, example.response]


@pytest.mark.parametrize(("section", "row", "said"), list(rows()))
def test_a_row_of_the_page(section: str, row: str, said: str) -> None:
    mark, _, said = said.partition(" ")
    if mark == "→":
        assert read(section, json.loads(row)) == json.loads(said)
    else:
        assert mark == "✗"
        with pytest.raises(UserError) as caught:
            read(section, json.loads(row))
        assert said in str(caught.value)


def test_the_page_names_every_column() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = {*forms.ASKING, *forms.RESPONSES, *(name for pair in forms.PAIRS for name in pair)}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_page_has_rows_of_every_kind() -> None:
    assert {section for section, _, _ in rows()} == {
        "Prompts", "Examples", "Preferences", "Messages",
    }  # fmt: skip

"""What can be ranked, and what of it is left out."""

from __future__ import annotations

import subprocess
import sys

import pytest
from data_files import BLUE, USER, write
from ranking import ROOT, candidates, row, write_rows

from ppo_engine.data.rows import BadLineError
from ppo_engine.errors import UserError
from ppo_engine.pages.ranking.candidates import candidate_of, load_candidates


def test_what_cannot_be_ranked_is_left_out_and_told(tmp_path):
    same = row(1) | {"responses": ["a"] * 4, "finished": [True] * 4}
    turned = row(0) | {"responses": row(0)["responses"][::-1], "finished": row(0)["finished"][::-1]}
    file = write_rows(tmp_path / "c.jsonl", [row(0), same, row(2), row(0), turned])
    found, notes = load_candidates(file)
    assert [one.place for one in found] == [f"{file}:1", f"{file}:3"]
    assert notes == [
        "1 row left out: they have no two different responses.",
        "2 rows left out: the same came before.",
    ]
    with pytest.raises(UserError, match="nothing to rank"):
        load_candidates(write_rows(tmp_path / "none.jsonl", [same]))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"prompt": "a"}, r"data\.jsonl:1: no column 'responses' \(columns: 'prompt'\)"),
        ({"responses": ["a", "b"]}, "no column 'prompt'"),
        ({"prompt": "a", "responses": "b"}, "'responses' must be a list, not str"),
        ({"prompt": "a", "responses": ["b", 3]}, "'responses' must be text or messages"),
        ({"prompt": "a", "responses": ["b"], "finished": []}, "differ in length"),
        ({"prompt": "a", "responses": ["b"], "finished": [1]}, "true or false"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
    ],
)
def test_other_rows_are_refused_with_what_writes_such(tmp_path, wrong, problem):
    with pytest.raises(UserError, match=problem) as error:
        load_candidates(write(tmp_path, wrong))
    assert "`ppo-engine generate --n 4 --out FILE` writes such rows." in str(error.value)
    assert "data." not in str(error.value).replace("data.jsonl", "")  # it takes no settings


def test_the_key_is_of_what_a_person_judges():
    [one] = candidates(1)
    assert one.key == candidate_of(row(0, scores=[1, 2, 3, 4], note="x"), "elsewhere").key
    texts, ended = row(0)["responses"], row(0)["finished"]
    turned = row(0) | {"responses": texts[::-1], "finished": ended[::-1]}
    assert one.key == candidate_of(turned, "").key
    for other in (row(1), row(0, 3), row(0) | {"finished": [True] * 4}, row(0, system="Be brief.")):
        assert one.key != candidate_of(other, "").key


def test_equal_responses_are_shown_once():
    texts = ["a", "b", "a", "a"]
    found = candidate_of({"prompt": "p", "responses": texts, "finished": [True] * 3 + [False]}, "")
    assert found.distinct == (0, 1, 3)  # one was cut off
    assert found.first_like == (0, 1, 0, 3)
    other = candidate_of(
        {"prompt": "p", "responses": texts[::-1], "finished": [False] + [True] * 3}, ""
    )
    assert found.in_order_of(other, [5, 6, 5, 7]) == [7, 5, 6]


def test_chats_and_messages_are_taken():
    found = candidate_of({"messages": [USER], "responses": [[BLUE], "Red."]}, "")
    assert found.prompt == [USER] and found.responses == ("Blue.", "Red.")
    dialogue = "\n\nHuman: Hi\n\nAssistant:"
    assert candidate_of({"prompt": dialogue, "responses": []}, "").prompt == [
        {"role": "user", "content": "Hi"}
    ]
    with pytest.raises(BadLineError, match="nothing to answer"):
        candidate_of({"prompt": [USER, BLUE], "responses": []}, "")


def test_neither_torch_nor_transformers_is_loaded():
    """The page opens at once."""
    code = (
        "import sys; import ppo_engine.pages.ranking.work, ppo_engine.pages.ranking.compare\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""Exports of Argilla and Label Studio: what each says, what is counted, and what is not guessed.

The records are as argilla 2.8 and the converter of label-studio-sdk 2.1 write them, shortened.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from ppo_engine.data.preferences import Ranking, load_preferences
from ppo_engine.errors import UserError

Row = dict[str, Any]
THREE = {"prompt": "Q", "response-1": "A", "response-2": "B", "response-3": "C"}
TWO = {"instruction": "Q", "response_1": "A", "response_2": "B"}
PAIR = {"prompt": "Q", "answer1": "A", "answer2": "B"}
LEFT = {"from_name": "pw", "to_name": "pw", "type": "pairwise", "value": {"selected": "left"}}
RIGHT = LEFT | {"value": {"selected": "right"}}
ITEMS = [{"id": f"llm_{text}", "title": f"LLM {text}", "body": text} for text in "ABC"]
RANKED = {"rank": ["llm_C", "llm_A", "llm_B"]}
C_A_B = [("C", "A"), ("C", "B"), ("A", "B")]


def argilla(fields: Row, **answers: list[tuple[Any, str | None]]) -> Row:
    """`records.to_json`; without a status, as argilla writes it, where that is None."""
    responses = {
        question: [
            {"value": value, "user_id": str(user)} | ({"status": status} if status else {})
            for user, (value, status) in enumerate(given)
        ]
        for question, given in answers.items()
    }
    row = {"id": "1", "fields": fields, "metadata": {}, "suggestions": {}, "responses": responses}
    return row | {"vectors": {}, "status": "pending", "_server_id": None}


def argilla_flat(fields: Row, **answers: list[tuple[Any, str]]) -> Row:
    """`records.to_list(flatten=True)` and `records.to_datasets`."""
    row: Row = {"id": "1", "status": "pending", "_server_id": None, **fields, "topic": "x"}
    for question, given in answers.items():
        row[f"{question}.responses"] = [value for value, _ in given] or None
        row[f"{question}.responses.users"] = [str(user) for user in range(len(given))] or None
        row[f"{question}.responses.status"] = [status for _, status in given] or None
        row[f"{question}.suggestion"] = None
    return row


def argilla_1(fields: Row, **answers: list[tuple[Any, str]]) -> Row:
    """`FeedbackDataset.format_as("datasets")`."""
    row: Row = {**fields, "external_id": None, "metadata": "{}"}
    for question, given in answers.items():
        row[question] = [{"user_id": "1", "value": v, "status": s} for v, s in given]
        row[f"{question}-suggestion"] = None
    return row


def studio(data: Row, *annotations: list[Row] | None, **more: Any) -> Row:
    """One task of Label Studio's JSON; an annotation that is None was cancelled."""
    made = [
        {"id": number, "completed_by": number, "result": result or [],
         "was_cancelled": result is None, "ground_truth": False}
        for number, result in enumerate(annotations)
    ]  # fmt: skip
    return {"id": 1, "data": data, "annotations": made, "drafts": [], "predictions": []} | more


def studio_min(data: Row, **columns: Any) -> Row:
    return {**data, "id": 1, **columns, "annotator": 1, "annotation_id": 10,
            "created_at": "2024-01-01", "updated_at": "2024-01-01", "lead_time": 3.1}  # fmt: skip


def ranker(buckets: Row) -> Row:
    return {"from_name": "rank", "to_name": "results", "type": "ranker",
            "value": {"ranker": buckets}}  # fmt: skip


ORDER = ["response-3", "response-1", "response-2"]
WITH_TIE = [{"value": name, "rank": rank} for name, rank in zip(ORDER, (1, 2, 2), strict=True)]
EXPORTS: dict[str, tuple[Row, list[tuple[str, str]], dict[str, int]]] = {
    "argilla 2, ranking": (argilla(THREE, preference=[(ORDER, None)]), C_A_B, {}),
    "argilla 2, fields without numbers": (
        argilla({"prompt": "Q", "x": "A", "y": "B"}, rank=[(["y", "x"], None)]), [("B", "A")], {},
    ),
    "argilla 2, beside other questions": (
        argilla(THREE, rank=[(ORDER, None)], why=[("none at all", None)], score=[(4, None)],
                topics=[(["art", "science"], None)]),
        C_A_B, {},
    ),
    "argilla 2, label": (argilla(TWO, best=[("response_2", None)]), [("B", "A")], {}),
    "argilla 2, label as its title": (argilla(TWO, best=[("Response 2", None)]), [("B", "A")], {}),
    "argilla 2, best of three": (
        argilla(THREE, best=[("response-2", None)]), [("B", "A"), ("B", "C")], {},
    ),
    "argilla 2, two annotators and a tie": (
        argilla(TWO, best=[("response_1", None), ("response_2", None), ("Tie", None)]),
        [("A", "B"), ("B", "A")], {"vote for a tie": 1},
    ),
    "argilla 2, statuses": (
        argilla(TWO, best=[("response_1", "submitted"), ("response_2", "draft")]),
        [("A", "B")], {"draft annotation": 1},
    ),
    "argilla 2, flat": (
        argilla_flat(THREE, rank=[(ORDER, "submitted"), (ORDER[::-1], "discarded")], why=[]),
        C_A_B, {"discarded annotation": 1},
    ),
    "argilla 2, flat and not annotated": (
        argilla_flat(THREE, rank=[]), [], {"record without an annotation": 1},
    ),
    "argilla 2, not annotated": (argilla(THREE), [], {"record without an annotation": 1}),
    "argilla 1, with ranks and ties": (
        argilla_1(THREE, rank=[(WITH_TIE, "submitted"), (WITH_TIE, "discarded")]),
        [("C", "A"), ("C", "B")], {"discarded annotation": 1},
    ),
    "argilla 1, as older data sets decode it": (
        argilla_1(THREE, rank=[({"rank": [2, 1], "value": ORDER[:2]}, "submitted")]),
        [("A", "C")], {},
    ),
    "argilla 1, label": (argilla_1(TWO, best=[("response_1", "submitted")]), [("A", "B")], {}),
    "argilla 1, not annotated": (
        argilla_1(THREE, rank=[]), [], {"record without an annotation": 1},
    ),
    "label studio, pairwise": (
        studio(PAIR, [LEFT], [RIGHT], None, [], drafts=[{"result": [LEFT]}]),
        [("A", "B"), ("B", "A")],
        {"cancelled annotation": 1, "empty annotation": 1, "draft annotation": 1},
    ),
    "label studio, beside other columns and results": (
        studio(PAIR | {"model1": "x", "model2": "y", "source": "z", "n": 3},
               [LEFT, {"from_name": "why", "type": "textarea", "value": {"text": ["so"]}}]),
        [("A", "B")], {},
    ),
    "label studio, columns out of order": (
        studio({"answer_b": "B", "prompt": "Q", "answer_a": "A"}, [RIGHT]), [("B", "A")], {},
    ),
    "label studio, not annotated": (studio(PAIR), [], {"record without an annotation": 1}),
    "label studio, ranker": (
        studio({"prompt": "Q", "items": ITEMS, "contexts": [{"id": "other"}]}, [ranker(RANKED)]),
        C_A_B, {},
    ),
    "label studio min, pairwise": (
        studio_min(PAIR, pw=[{"selected": "right"}], why="so"), [("B", "A")], {},
    ),
    "label studio min, ranker": (
        studio_min({"prompt": "Q", "items": ITEMS}, rank=[{"ranker": RANKED}]), C_A_B, {},
    ),
    "label studio min, not annotated": (
        studio_min(PAIR) | {"annotation_id": None}, [], {"record without an annotation": 1},
    ),
}  # fmt: skip
GOOD = {"prompt": "ordinary", "chosen": "yes", "rejected": "no"}


def pairs_of(ranking: Ranking) -> list[tuple[str, str]]:
    both = itertools.combinations(zip(ranking.ranks, ranking.responses, strict=True), 2)
    return [(better, worse) for (rank, better), (other, worse) in both if rank < other]


@pytest.mark.parametrize(
    ("row", "expected", "counted"),
    EXPORTS.values(),
    ids=[name.replace(" ", "-") for name in EXPORTS],
)
def test_what_an_export_says(
    tmp_path: Path, row: Row, expected: list[tuple[str, str]], counted: dict[str, int]
) -> None:
    file = tmp_path / "export.json"
    file.write_text(json.dumps([GOOD, row]))
    [first, *rankings], skipped = load_preferences(file, tokenizer=tiny_tokenizer())
    assert first == Ranking("ordinary", ("yes", "no"), (0, 1))
    assert [pair for ranking in rankings for pair in pairs_of(ranking)] == expected
    assert all(ranking.prompt == "Q" for ranking in rankings)
    assert dict(skipped.reasons) == counted


def test_whole_texts_without_a_prompt() -> None:
    row = studio({"text1": "The sky is blue.", "text2": "The sky is black."}, [RIGHT])
    [pair], _ = load_preferences([row], tokenizer=tiny_tokenizer())
    assert pair == Ranking("The sky is", (" black.", " blue."), (0, 1))


def test_a_chat_is_a_prompt() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    for row in (
        argilla(TWO | {"instruction": chat}, best=[("response_1", None)]),
        studio(PAIR | {"prompt": chat}, [LEFT]),
    ):
        [pair], _ = load_preferences([row], tokenizer=tiny_tokenizer())
        assert pair == Ranking(chat, ("A", "B"), (0, 1))


def test_an_annotation_is_named_and_its_neighbors_are_kept() -> None:
    row = studio(PAIR, [LEFT], [LEFT | {"value": {"selected": "both"}}])
    with pytest.raises(UserError, match=r"preferences\[0\], annotation 2: 'selected' is neither"):
        load_preferences([row], tokenizer=tiny_tokenizer())
    pairs, skipped = load_preferences([row], tokenizer=tiny_tokenizer(), on_bad_line="skip")
    assert len(pairs) == 1 and skipped.total == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (argilla(THREE, score=[(4, None)]), "no question compares .* text fields: prompt, resp"),
        (argilla(THREE, a=[(ORDER, None)], b=[(ORDER, None)]), r"several questions .*\(a, b\)"),
        (
            argilla(THREE, rank=[([*ORDER, "other"], None)]),
            "fields, each once: response-3, .*, other",
        ),
        (argilla(THREE, rank=[(ORDER + ORDER[:1], None)]), "text fields, each once"),
        (
            argilla(THREE, acceptable=[(ORDER[:2], None)]),
            "several labels .* names response-3, response-1 of response-1, response-2, response-3",
        ),
        (
            argilla({"prompt": "Q", "x": "A", "y": "B", "z": "C"}, fit=[(["z", "x"], None)]),
            "several labels without order",
        ),
        (argilla(THREE, Worst=[("response-1", None)]), "worst response: .* for the best"),
        (argilla(TWO, best=[("response_1", None), ("A", None)]), "label names no text field: 'A'"),
        (
            argilla({"prompt": "Q", "good": "A", "bad": "B"}, best=[("good", None)]),
            "not clear what a label was preferred to: expected fields such as response_1",
        ),
        (
            argilla({"ask": "Q", "response_1": "A", "response_2": "B"}, b=[("response_1", None)]),
            "it is not clear which field is the prompt: expected one named prompt or .* ask,",
        ),
        (
            studio(PAIR, [{"type": "choices", "from_name": "c", "value": {"choices": ["A"]}}]),
            r"expected one pairwise or ranker \(found: choices\)",
        ),
        (studio(PAIR, [LEFT, RIGHT]), r"\(found: pairwise, pairwise\)"),
        (studio({"prompt": "Q", "good": "A", "bad": "B"}, [LEFT]), "two columns were compared"),
        (studio(PAIR | {"reply1": "x", "reply2": "y"}, [LEFT]), "two columns were compared"),
        (studio({"ask": "Q", "answer1": "A", "answer2": "B"}, [LEFT]), "which field is the prompt"),
        (
            studio({"prompt": "Q", "items": ITEMS}, [ranker({"good": ["llm_A"], "bad": []})]),
            "ranked into buckets, whose order is not in the export: expected a Ranker without",
        ),
        (studio({"prompt": "Q", "items": ITEMS}, [ranker({"good": ["llm_A"]})]), "into buckets"),
        (studio({"prompt": "Q", "items": ITEMS[:2]}, [ranker(RANKED)]), "which list was ranked"),
        (studio(PAIR, ["left"]), "'result' must be a list of dictionaries"),
        (studio_min(PAIR), r"expected one pairwise or ranker \(found: none\)"),
    ],
)
def test_nothing_is_guessed(row: Row, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_preferences([GOOD, row], tokenizer=tiny_tokenizer())
    pairs, skipped = load_preferences([GOOD, row], tokenizer=tiny_tokenizer(), on_bad_line="skip")
    assert pairs[0].prompt == "ordinary" and skipped.total == 1

"""What a run's data is called: the same for the same rows, whatever their columns hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ppo_engine.data.digest import changed_data, describe_rows
from ppo_engine.data.prompts import PromptExample


class Picture:
    """Without a `repr` of its own, which would tell nothing but where it lies."""


def of(value: Any, place: str = "") -> str:
    return describe_rows([PromptExample("Q", {"column": value}, place)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": [1, None, "ü"]},
        lambda: np.arange(2000),
        lambda: [np.float32(0.5)],
        lambda: b"bytes",
        Picture,
        lambda: {(1, 2): "key"},
    ],
)
def test_equal_rows_are_described_alike(make: Any) -> None:
    kept = [make(), make()]  # at once, or the second could lie where the first did
    assert of(kept[0], "a.jsonl:1") == of(kept[1], "b.jsonl:7")


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (1, "1"), (np.arange(2000), np.arange(2000) * (np.arange(2000) != 1000)), ("", None)],
)
def test_other_rows_are_not(one: Any, other: Any) -> None:
    assert of(one) != of(other)


def test_rows_are_counted_and_in_order() -> None:
    a, b = PromptExample("a"), PromptExample("b")
    assert describe_rows([a]).startswith("1 row, digest ") and describe_rows([]).startswith(
        "0 rows"
    )
    assert describe_rows([a, b]) != describe_rows([b, a])


def test_each_part_that_changed_has_a_line() -> None:
    then, now = {"x": "1", "y": "2"}, {"x": "1", "z": "3"}
    assert changed_data(then, now) == ["y: 2 then, nothing now", "z: nothing then, 3 now"]

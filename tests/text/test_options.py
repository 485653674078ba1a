"""What the columns of a row hand to the chat template."""

from __future__ import annotations

import pytest

from ppo_engine.text.options import as_columns, from_columns, row_options


def test_a_rows_columns_reach_the_template() -> None:
    columns = {"tools": [None, ["t"]], "chat_template_kwargs": [{"a": 1}, None], "other": [1, 2]}
    assert [row_options(columns, row) for row in range(2)] == [{"a": 1}, {"tools": ["t"]}]
    assert row_options({}, 0) == {}


@pytest.mark.parametrize("options", [{}, {"a": 1}, {"tools": ["t"]}, {"tools": ["t"], "a": 1}])
def test_options_travel_as_columns(options) -> None:
    assert from_columns({"other": 1, **as_columns(options)}) == options

"""Examples in rows and passes; that texts in a row stay apart is tested with their trainer."""

from __future__ import annotations

import time

import pytest

from ppo_engine.models.packing import plan


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("lengths", [[5], [3] * 40, [64, 1, 1, 63, 2], [*range(1, 65)]])
def test_a_plan_holds_every_example_once_within_its_limits(lengths: list[int], pack: bool) -> None:
    passes = plan(lengths, room=64, rows=3, pack=pack)
    rows = [row for forward in passes for row in forward]
    assert sorted(index for row in rows for index in row) == [*range(len(lengths))]
    for forward in passes:
        widths = [sum(lengths[i] for i in row) for row in forward]
        assert max(widths) <= 64 and len(forward) * max(widths) <= 3 * 64
    if pack:  # first fit leaves at most one row half empty
        assert sum(sum(lengths[i] for i in row) <= 32 for row in rows) <= 1
    else:
        assert all(len(row) == 1 for row in rows)


@pytest.mark.parametrize("pack", [True, False])
def test_a_plan_of_many_examples_takes_no_time(pack: bool) -> None:
    started = time.process_time()
    assert len(plan([64] * 20_000, room=64, rows=1, pack=pack)) == 20_000
    assert time.process_time() - started < 2  # where every row is looked at for each: 10 and more

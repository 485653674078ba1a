"""In which order a person is shown what."""

from __future__ import annotations

from collections import Counter

import pytest

from ppo_engine.pages.ranking.plan import LATER, plan, shuffled


@pytest.mark.parametrize("count", [1, 3, 20, 57, 400])
def test_every_prompt_comes_once_and_one_in_twenty_again(count):
    tasks = plan(count, 0, "ada")
    assert [task.candidate for task in tasks if not task.again] == list(range(count))
    again = [task.candidate for task in tasks if task.again]
    assert count // 20 <= len(again) <= -(-count // 20)
    assert max(Counter(again).values(), default=1) == 1


def test_a_remainder_has_one_as_often_as_its_share():
    found = sum(any(task.again for task in plan(5, seed, "ada")) for seed in range(2000))
    assert found / 2000 == pytest.approx(5 / 20, abs=0.04)


def test_it_comes_again_after_others():
    for seed in range(50):
        tasks = plan(60, seed, "ada")
        for place, task in enumerate(tasks):
            if task.again:
                between = tasks[:place][::-1]
                assert [one.candidate for one in between].index(task.candidate) >= LATER


def test_each_person_and_seed_has_its_own_and_keeps_it():
    assert plan(400, 0, "ada") == plan(400, 0, "ada")
    assert len({tuple(plan(400, seed, name)) for seed in range(3) for name in ("ada", "bob")}) == 6
    shown = range(4)
    assert shuffled(shown, 0, "ada", "k") == shuffled(shown, 0, "ada", "k")
    drawn = Counter(tuple(shuffled(shown, seed, "ada", "k")) for seed in range(2400))
    assert len(drawn) == 24 and min(drawn.values()) > 60  # of 100 each


@pytest.mark.parametrize("count", [2, 3, 4])
def test_what_comes_again_comes_in_another_order(count):
    for seed in range(100):
        first = shuffled(range(count), seed, "ada", "k")
        second = shuffled(range(count), seed, "ada", "k", first)
        assert second != first and sorted(second) == sorted(first)

"""How far rankings agree: by hand, and against the definitions."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from ppo_engine.pages.ranking.agreement import Agreement, agreement, kendall_tau


@pytest.mark.parametrize(
    ("ours", "theirs", "tau"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0),
        ([0, 1, 2, 3], [3, 2, 1, 0], -1.0),
        ([0, 1, 2, 3], [0, 1, 3, 2], 4 / 6),  # one of six pairs turned round
        ([0, 5, 9], [0, 1, 2], 1.0),  # the order alone counts
        ([0, 0, 1], [0, 1, 2], 2 / math.sqrt(2 * 3)),
        ([0, 0, 1], [0, 0, 1], 1.0),  # tied alike
        ([0, 1, None, 2], [0, 1, 2, None], 1.0),  # of two that both ranked
        ([0, 0, 0], [0, 1, 2], None),  # tau-b is 0/0
        ([0, None], [0, 1], None),
    ],
)
def test_kendall_tau_by_hand(ours, theirs, tau):
    assert kendall_tau(ours, theirs) == (tau if tau is None else pytest.approx(tau))
    assert kendall_tau(theirs, ours) == kendall_tau(ours, theirs)


def test_kendall_tau_is_the_correlation_of_the_signs_of_pairs():
    """τ-b is the correlation of -1, 0, 1 over all ordered pairs."""
    draw = random.Random(1)
    for _ in range(200):
        ours, theirs = ([draw.randrange(4) for _ in range(5)] for _ in range(2))
        signs = [
            [(x[i] > x[j]) - (x[i] < x[j]) for i, j in itertools.permutations(range(5), 2)]
            for x in (ours, theirs)
        ]
        norm = math.prod(math.sqrt(sum(s * s for s in one)) for one in signs)
        dot = sum(a * b for a, b in zip(*signs, strict=True))
        assert kendall_tau(ours, theirs) == (pytest.approx(dot / norm) if norm else None)


def test_pairs_ties_and_standard_errors_by_hand():
    found = agreement([
        ([0, 1, 2], [0, 1, 2]),  # 3 of 3 alike
        ([0, 1, 2], [0, 0, 1]),  # 2 alike, one half
        ([0, 1], [1, 0]),  # 0 of 1
        ([0, 0], [0, 0]),  # no pair is in an order
        ([0, None], [0, 1]),  # no pair that both ranked
    ])  # fmt: skip
    assert (found.prompts, found.tau_prompts, found.pairs) == (4, 3, 7)
    assert found.accuracy == pytest.approx(5.5 / 7)
    # Of a ratio of sums, over prompts (Cochran 1977).
    residuals = [3 - 3 * 5.5 / 7, 2.5 - 3 * 5.5 / 7, 0 - 5.5 / 7]
    error = math.sqrt(sum(r * r for r in residuals) * 3 / 2) / 7
    assert found.accuracy_error == pytest.approx(error)
    taus = [1, 2 / math.sqrt(6), -1]
    mean = sum(taus) / 3
    assert found.tau == pytest.approx(mean)
    error = math.sqrt(sum((tau - mean) ** 2 for tau in taus) / 2 / 3)
    assert found.tau_error == pytest.approx(error)


def test_the_standard_error_is_that_of_many_draws():
    """Of pairs that go together within a prompt."""
    draw = random.Random(2)

    def sample() -> Agreement:
        return agreement(
            [([0, 1, 2], [0, 1, 2] if draw.random() < 0.7 else [2, 1, 0]) for _ in range(60)]
        )

    drawn = [sample() for _ in range(300)]
    mean = sum(one.accuracy for one in drawn) / len(drawn)
    spread = math.sqrt(sum((one.accuracy - mean) ** 2 for one in drawn) / (len(drawn) - 1))
    told = sum(one.accuracy_error for one in drawn) / len(drawn)
    assert told == pytest.approx(spread, rel=0.15)


def test_in_words():
    one = agreement([([0, 1], [0, 1])])
    assert str(one) == "Kendall's τ 1.00, 100.0% of 1 pair alike (± standard error), 1 prompt"
    two = agreement([([0, 1], [0, 1]), ([0, 1], [1, 0])])
    assert str(two).startswith("Kendall's τ 0.00 ± 1.00, 50.0% ± 50.0% of 2 pairs alike")
    ties = agreement([([0, 0], [0, 1])])
    assert str(ties).startswith("Kendall's τ not to be told, 50.0% of 1 pair alike")
    assert str(agreement([([0, 0], [0, 0])])) == "1 prompt, of which none has a pair in an order"

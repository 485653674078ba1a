"""Best-of-n: the estimator against every subset, and the KL bound where it is exact."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from ppo_engine.rewards.best_of_n import expected_best, kl_bound

SCORES = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", range(1, 7))
def test_it_is_the_mean_over_all_subsets(n):
    scores = SCORES.clone()
    scores[1, 2] = scores[1, 4]  # a tie
    for row, found in zip(scores, expected_best(scores, n), strict=True):
        best = [max(subset) for subset in combinations(row.tolist(), n)]
        assert found.item() == pytest.approx(sum(best) / len(best), rel=1e-12)


def test_it_is_unbiased():
    """Scores uniform on 0 to 1: the maximum of n has the mean n / (n + 1)."""
    scores = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(1))
    for n in (1, 3, 8):
        best = expected_best(scores, n)
        error = best.std().item() / math.sqrt(len(best))
        assert abs(best.mean().item() - n / (n + 1)) < 4 * error


def test_scores_of_0_and_1_give_pass_at_k():
    correct, total, n = 3, 10, 4
    scores = torch.tensor([[1.0] * correct + [0.0] * (total - correct)])
    expected = 1 - math.comb(total - correct, n) / math.comb(total, n)
    assert expected_best(scores, n).item() == pytest.approx(expected)


def test_many_responses_keep_precision_and_dtype():
    scores = torch.full((2, 3000), 0.5)
    best = expected_best(scores, 1500)  # binomials of 900 digits
    assert best.dtype == torch.float32
    assert best.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("scores", "n", "message"),
    [
        (torch.zeros(3), 1, r"\(3,\) torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int64), 1, "torch.int64"),
        (torch.zeros(2, 3), 0, "from 1 to 3, .* but is 0"),
        (torch.zeros(2, 3), 4, "but is 4"),
    ],
)
def test_what_does_not_fit_is_named(scores, n, message):
    with pytest.raises(ValueError, match=message):
        expected_best(scores, n)


def test_the_kl_bound_is_the_divergence_where_no_two_responses_tie():
    """Best-of-n has the density n F^(n-1) against the policy's: its KL over F from 0 to 1."""
    for n in (1, 2, 5):
        quantiles = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
        density = n * quantiles ** (n - 1)
        assert kl_bound(n) == pytest.approx((density * density.log()).mean().item(), abs=1e-5)

"""Normalization, missing EOS, length penalty, and their order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ppo_engine.errors import UserError
from ppo_engine.rewards.shaping import ScoreNormalizer, length_penalty, shape_scores
from ppo_engine.rollout.batch import Rollout
from ppo_engine.settings.checks import check_settings
from ppo_engine.settings.schema import PPOConfig, RewardConfig


def rollout(lengths: list[int], finished: list[bool]) -> Rollout:
    """Responses of so many tokens to prompts of one."""
    rows, width = len(lengths), max(lengths)
    ids = torch.zeros(rows, width, dtype=torch.long)
    return Rollout(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        response_ids=ids,
        mask=torch.arange(width) < torch.tensor(lengths)[:, None],
        finished=torch.tensor(finished),
        prompts=["x"] * rows,
        responses=[""] * rows,
    )


def test_normalized_scores_have_mean_0_and_deviation_1():
    scores = 5 + 3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    normalized = ScoreNormalizer(responses=64)(scores)
    assert normalized.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalized.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_statistics_merge_over_rollouts_then_stay_and_survive_a_checkpoint():
    parts = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 2 - 7
    normalizer = ScoreNormalizer(responses=16)
    normalizer(parts[0])
    normalizer(parts[1])
    first = parts[:2].double()
    third = normalizer(parts[2] + 100)  # comes too late to count
    expected = (parts[2] + 100 - first.mean()) / first.std(unbiased=False)
    torch.testing.assert_close(third, expected.float(), rtol=1e-5, atol=1e-5)

    restored = ScoreNormalizer(responses=16)
    restored.load_state_dict(normalizer.state_dict())
    assert torch.equal(restored(parts[2] + 100), third)


def test_equal_scores_stay_finite():
    assert ScoreNormalizer()(torch.full((4,), 2.0)).tolist() == [0.0] * 4
    normalizer = ScoreNormalizer(responses=4)
    normalizer(torch.full((4,), 2.0))
    assert normalizer(torch.tensor([3.0])).tolist() == [1.0]  # they have no scale to divide by


@pytest.mark.parametrize(("apart", "counts"), [(1e-3, False), (1e-1, True)])
def test_nor_is_their_rounding_one(apart, counts):
    found = ScoreNormalizer()(torch.tensor([1000.0, 1000 + apart, 1000.0, 1000 + apart]))
    assert bool(found.abs().max() > 0.9) == counts


def test_the_length_penalty_is_of_what_the_policy_wrote():
    said = rollout([6, 4], [True, True])
    heard = torch.zeros_like(said.mask)
    heard[0, 1:4] = True
    said = replace(said, mask=said.mask & ~heard, environment_mask=heard)
    shaped = shape_scores(torch.zeros(2), said, RewardConfig(length_penalty=1.0), None, learn=True)
    assert shaped.tolist() == [-3.0, -4.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0, 2.0, 3.0]),
        ({"missing_eos_penalty": 0.5}, [1.0, 1.5, 3.0]),
        ({"missing_eos_score": -1.0}, [1.0, -1.0, 3.0]),
        ({"length_penalty": 0.5}, [0.5, -0.5, 1.5]),
        ({"length_penalty": 0.5, "length_penalty_from": 3}, [1.0, 1.0, 3.0]),
        # The length penalty comes last: a replaced score pays it too, and it is not normalized.
        ({"length_penalty": 0.5, "missing_eos_score": -1.0}, [0.5, -3.5, 1.5]),
        ({"normalize": True, "length_penalty": 0.5}, [-1.7247, -2.5, -0.2753]),
        ({"normalize": True, "missing_eos_score": -9.0}, [-1.2247, -9.0, 1.2247]),
        ({"normalize": True, "missing_eos_penalty": 0.5}, [-1.2247, -0.5, 1.2247]),
    ],
    ids=str,
)
def test_scores_are_shaped_in_the_documented_order(settings, expected):
    config = RewardConfig(**settings)
    normalizer = ScoreNormalizer() if config.normalize else None
    shaped = shape_scores(
        torch.tensor([1.0, 2.0, 3.0]),
        rollout([1, 5, 3], [True, False, True]),
        config,
        normalizer,
        learn=True,
    )
    assert shaped.dtype == torch.float32
    assert shaped.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_length_penalty_is_the_soft_overlong_punishment_of_dapo():
    """Eq. 13 with a limit of 20 tokens, 8 of them the cache."""
    limit, cache = 20, 8
    lengths = torch.arange(1, limit + 1)
    config = RewardConfig(length_penalty=1 / cache, length_penalty_from=limit - cache)
    punished = [
        0 if n <= limit - cache else ((limit - cache) - n) / cache for n in lengths.tolist()
    ]
    assert (-length_penalty(lengths, config)).tolist() == pytest.approx(punished)


def test_a_penalty_beside_a_replacement_would_do_nothing() -> None:
    both = RewardConfig(missing_eos_score=0.0, missing_eos_penalty=0.5)
    with pytest.raises(UserError, match="missing_eos_penalty would have no effect"):
        check_settings(PPOConfig(reward=both))
    for one in ({"missing_eos_score": 0.0}, {"missing_eos_penalty": 0.5}):
        check_settings(PPOConfig(reward=RewardConfig(**one)))

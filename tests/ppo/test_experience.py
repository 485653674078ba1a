"""What a step learns from: selections of it, its metrics, importance weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from rollouts import ROWS, rollout_of, tokens_of

from ppo_engine.ppo.experience import Experience, importance_weights, objective_metrics
from ppo_engine.rollout.batch import Rollout


def experience_of(rollout: Rollout) -> Experience:
    shape, b = rollout.mask.shape, len(rollout)
    random = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:  # what stands at padding must not count
        return torch.randn(shape, generator=random).where(rollout.mask, torch.nan)

    return Experience(
        rollout=rollout,
        scores=torch.arange(float(b)) ** 2,
        logprobs=draw(),
        ref_logprobs=draw(),
        advantages=draw(),
        kl=torch.arange(float(b)),
        kl_coef=torch.tensor(0.3),
        moments=torch.tensor([1.0, 2.0, 3.0]),
        entropy=draw(),
        policy_version=7,
        values=draw(),
        returns=draw(),
        is_weights=draw(),
    )


def test_a_selection_of_experience_has_the_rows_of_every_tensor():
    whole = experience_of(rollout_of())
    rows = [3, 1]
    found = whole.select(torch.tensor(rows))
    width = found.rollout.mask.shape[1]
    assert width == len(tokens_of(ROWS[3])[0]) < whole.rollout.mask.shape[1]
    for name in ("logprobs", "ref_logprobs", "advantages", "entropy", "values", "returns"):
        for place, row in enumerate(rows):
            of_row = getattr(whole, name)[row][:width]
            assert torch.equal(getattr(found, name)[place].nan_to_num(), of_row.nan_to_num())
    assert torch.equal(found.is_weights.nan_to_num(), whole.is_weights[rows, :width].nan_to_num())
    assert found.scores.tolist() == [9.0, 1.0] and found.kl.tolist() == [3.0, 1.0]
    # Whitening and the penalty's weight are those of the whole rollout.
    assert found.moments.tolist() == [1.0, 2.0, 3.0] and found.kl_coef.item() == pytest.approx(0.3)
    assert found.policy_version == 7 and len(found) == 2
    assert list(found.rollout.columns["row"]) == rows
    none = dataclasses.replace(whole, values=None, returns=None, is_weights=None)
    assert none.select(torch.tensor(rows)).values is None


def test_objective_metrics_count_the_policys_tokens_alone():
    """Those of the environment and the padding are NaN here."""
    experience = experience_of(rollout_of())
    rollout, mask = experience.rollout, experience.rollout.mask
    found = objective_metrics(experience, 0.5)

    def own(values: torch.Tensor) -> list[list[float]]:
        return [values[b][mask[b]].tolist() for b in range(len(mask))]

    def flat(name: str) -> list[float]:
        return [value for row in own(getattr(experience, name)) for value in row]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def variance(values: list[float]) -> float:
        return mean([(v - mean(values)) ** 2 for v in values])

    pairs = zip(own(experience.logprobs), own(experience.ref_logprobs), strict=True)
    kl = [sum(p) - sum(q) for p, q in pairs]
    errors = [v - r for v, r in zip(flat("values"), flat("returns"), strict=True)]
    expected = {
        "objective/scores": mean(experience.scores.tolist()),
        "objective/scores_std": math.sqrt(variance(experience.scores.tolist())),
        "objective/kl": mean(kl),
        "objective/kl_coef": 0.3,
        "objective/entropy": mean(flat("entropy")),
        "objective/response_length": len(flat("entropy")) / 6,
        "objective/finished": 4 / 6,
        "objective/importance_weight": mean(flat("is_weights")),
        "objective/importance_capped": mean([weight >= 0.5 for weight in flat("is_weights")]),
        "value/explained_variance": 1 - variance(errors) / variance(flat("returns")),
    }
    assert found == pytest.approx(expected, rel=1e-4)
    flat_returns = dataclasses.replace(experience, returns=torch.full_like(experience.returns, 0.5))
    assert expected.keys() - objective_metrics(flat_returns).keys() == {
        "objective/importance_capped",
        "value/explained_variance",
    }
    bare = dataclasses.replace(experience, values=None, returns=None, is_weights=None)
    of_those = {"importance_weight", "importance_capped", "explained_variance"}
    left = {name for name in expected if name.partition("/")[2] not in of_those}
    assert objective_metrics(bare, None).keys() == left
    assert rollout.finished.sum() == 4


def test_importance_weights_are_ratios_to_the_sampler_up_to_the_cap():
    rollout = rollout_of()
    apart = torch.linspace(-1, 1, rollout.mask.numel()).view_as(rollout.mask.float())
    logprobs = torch.full(apart.shape, -2.0).where(rollout.mask, torch.nan)
    sampled = dataclasses.replace(rollout, logprobs=logprobs - apart)
    found = importance_weights(sampled, logprobs, 1.5)
    for b in range(len(rollout)):
        for t in rollout.mask[b].nonzero()[:, 0].tolist():
            expected = min(math.exp(apart[b, t]), 1.5)
            assert found[b, t].item() == pytest.approx(expected, rel=1e-5)
    assert found.isfinite().all()
    assert importance_weights(sampled, logprobs, None) is None

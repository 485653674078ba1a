"""However the responses of a mini-batch are split into passes, and packed or padded: the same
gradients and metrics, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reading import spied
from rollouts import ROWS, SCORES, move, moved_engine, record, rollout_of

# Of `ROWS`, two groups with several turns, an environment's among them, and one of a token alone.
WAYS = {"one pass": (9999, True), "each alone": (1, True), "padded": (9999, False)}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "gae": {},
    "monte_carlo": {},
    "td": {},
    "grpo": {"group_size": 3},
    "dr_grpo": {"group_size": 3},
    "rloo": {"group_size": 3},
    "reinforce_pp": {},
    "remax": {},
}


def step(monkeypatch: Any, ppo: dict[str, Any], tokens: int, packed: bool, **more: Any) -> Any:
    """Metrics and gradients of one step, off policy."""
    sizes = {"mini_batch_size": 6, "micro_batch_size": None, "micro_batch_tokens": tokens}
    engine = moved_engine(ppo={**sizes, **ppo}, **more)
    readers = [engine.policy.reader, *([engine.critic.reader] if engine.critic else [])]
    for reader in readers:
        reader.packs = packed
    read = [spied(reader, monkeypatch) for reader in readers]
    greedy = rollout_of((ROWS[1], ROWS[4]))
    rollout = rollout_of(greedy=greedy)
    experience = engine.estimate_advantages(rollout, SCORES)
    move(engine.policy.model, seed=3)
    engine.actor.version += 1
    with monkeypatch.context() as patch:
        steps = record(engine, patch)
        metrics = engine.update(experience)
    passes = 1 if tokens > 1 else 6
    for of_reader in read:
        assert len(of_reader) == 2 * passes  # one each of the experience and the update
        assert all((rows.segments is not None) == packed for rows in of_reader)
    return metrics, [x.gradients for x in (*steps.policy, *steps.critic)]


def assert_alike(found: list[Any]) -> None:
    (expected, whole), *others = found
    for metrics, gradients in others:
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
        for ours, theirs in zip(gradients, whole, strict=True):
            largest = max(g.abs().max().item() for g in theirs)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_passes_add_up_to_the_mini_batch(monkeypatch, estimator, reduction):
    ppo = {"estimator": estimator, "reduction": reduction, **ESTIMATORS[estimator]}
    found = [step(monkeypatch, ppo, *way) for way in WAYS.values()]
    assert found[0][0]["policy/clip_fraction"] > 0 and all(g.any() for g in found[0][1][0])
    assert len(found[0][1]) == 1 + (estimator in ("gae", "monte_carlo", "td"))
    assert_alike(found)


def test_checkpointed_passes_give_the_same_gradients(monkeypatch):
    found = [
        step(monkeypatch, {}, 9999, True, policy={"gradient_checkpointing": on})
        for on in (False, True)
    ]
    assert_alike(found)

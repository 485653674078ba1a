"""An update's steps, one by one, by hand in float64: the rows, the loss, the gradient that reaches
every weight, and the metrics, on the first mini-batch and on those that the policy has left."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from rollouts import (
    MAX_NEW_TOKENS,
    ROWS,
    SCORES,
    Step,
    move,
    moved_engine,
    own_logits,
    read,
    record,
    rollout_of,
    values_of,
)
from torch import Tensor

from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.ppo.experience import Experience
from ppo_engine.settings.schema import AdaptiveKLConfig, LoraConfig, RewardConfig

B = len(ROWS)


class Found:
    """A step's loss and what its metrics are made of, from the formulas."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.ratios: list[Tensor] = []
        self.log_ratios: list[Tensor] = []
        self.clipped: list[Tensor] = []
        self.kl: list[Tensor] = []


def policy_step(engine: PPOEngine, experience: Experience, step: Step, on_policy: bool) -> Found:
    """PPO's loss of a mini-batch, written out for each response."""
    settings = engine.config.ppo
    mask = experience.rollout.mask
    low, high = (
        settings.clip_range
        if isinstance(settings.clip_range, tuple)
        else (settings.clip_range, settings.clip_range)
    )
    real = experience.advantages[mask].double()
    mean, deviation = real.mean(), (real.var(unbiased=False) + 1e-8).sqrt()
    tokens = sum(int(mask[b].sum()) for b in step.rows)
    found = Found()
    for b in step.rows:
        own = mask[b]
        logprobs, entropy = read(step.model, experience.rollout, b)
        a = experience.advantages[b][own].double()
        if settings.whiten_advantages:
            a = (a - mean) / deviation
        old = logprobs.detach() if on_policy else experience.logprobs[b][own].double()
        log_ratio = logprobs - old
        ratio = log_ratio.exp()
        if settings.ratio_level == "sequence":  # of a response whose tokens share one advantage
            ratio = log_ratio.mean().exp().expand(len(a))
        bounded = ratio.clamp(1 - low, 1 + high)
        if settings.objective == "cispo":
            loss = -bounded.detach() * a * logprobs
            clipped = bounded != ratio
        else:
            loss = torch.maximum(-a * ratio, -a * bounded)
            clipped = -a * bounded > -a * ratio
        if settings.dual_clip is not None:
            loss = torch.where(a < 0, torch.minimum(loss, -settings.dual_clip * a), loss)
        if experience.is_weights is not None:
            loss = loss * experience.is_weights[b][own].double()
        if settings.kl_in == "loss":
            d = logprobs - experience.ref_logprobs[b][own].double()
            kl = {"k2": 0.5 * d * d, "k3": (-d).exp() - 1 + d}[settings.kl_estimator]
            loss = loss + settings.kl_coef * kl
            found.kl.append(kl.detach())
        loss = loss - settings.entropy_coef * entropy
        found.loss += loss.sum() / {
            "token_mean": tokens,
            "sequence_mean": len(a) * len(step.rows),
            "sum": len(step.rows) * MAX_NEW_TOKENS,
        }[settings.reduction]  # fmt: skip
        found.ratios.append(ratio.detach())
        found.log_ratios.append(log_ratio.detach())
        found.clipped.append(clipped)
    return found


def assert_gradients(step: Step, loss: Tensor) -> None:
    """`loss` of the step's model has the gradients that the step was taken with."""
    step.model.zero_grad()
    loss.backward()
    expected = [p.grad for p in step.model.parameters() if p.grad is not None]
    largest = max(g.abs().max().item() for g in expected)
    for found, gradient in zip(step.gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-4 * largest)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def token_mean(rows: list[Tensor]) -> float:
    return torch.cat(rows).double().mean().item()


PENALTY = {"kl_in": "loss", "kl_coef": 0.4}
GRPO = {"estimator": "grpo", "group_size": 3}
CASES = {
    "clip": ({"clip_range": 0.05}, {}),
    "own logits": ({"clip_range": 0.05}, {"model": own_logits}),
    "clip-higher, entropy": ({"clip_range": (0.02, 0.1), "entropy_coef": 0.3}, {}),
    "own logits, penalty": ({"entropy_coef": 0.3, **PENALTY}, {"model": own_logits}),
    "penalty k2": ({"kl_estimator": "k2", **PENALTY}, {}),
    "importance weights": ({"kl_coef": 5.0, "importance_cap": 1.1, "dual_clip": 1.05}, {}),
    "frozen layers": ({"kl_coef": 0.4}, {"policy": {"trainable_layers": 1}}),
    "adapters": ({"kl_coef": 0.4}, {"policy": {"lora": LoraConfig(rank=4)}}),
    "not whitened": ({"whiten_advantages": False, "gamma": 0.9}, {}),
    "dr_grpo": ({**GRPO, "estimator": "dr_grpo", **PENALTY}, {}),
    "grpo": ({**GRPO, **PENALTY}, {}),
    "cispo": ({**GRPO, "estimator": "rloo", "objective": "cispo", "clip_range": 0.05}, {}),
    "gspo": ({**GRPO, "ratio_level": "sequence", "clip_range": 0.02}, {}),
    "reinforce_pp": ({"estimator": "reinforce_pp", "reduction": "sequence_mean"}, {}),
}


@pytest.mark.parametrize(("ppo", "more"), CASES.values(), ids=CASES)
def test_every_step_of_the_policy_is_that_of_the_formula(monkeypatch, ppo, more):
    if "lora" in more.get("policy", {}):
        pytest.importorskip("peft")
    more = {**more, "model": more["model"]()} if "model" in more else more
    engine = moved_engine(ppo={"epochs": 2, **ppo}, **more)
    rollout = rollout_of()
    if "importance_cap" in ppo:
        logprobs, _, _ = engine.compare_with_reference(rollout)
        apart = torch.linspace(-0.5, 0.5, logprobs.numel()).view_as(logprobs)
        rollout = dataclasses.replace(rollout, logprobs=logprobs - apart)
    experience = engine.estimate_advantages(rollout, SCORES)
    assert (experience.is_weights is not None) == ("importance_cap" in ppo)
    steps = record(engine, monkeypatch).policy
    metrics = engine.update(experience)

    assert [list(map(len, step.passes)) for step in steps] == [[2, 2], [2], [2, 2], [2]]
    found = [policy_step(engine, experience, s, on_policy=i == 0) for i, s in enumerate(steps)]
    for step, expected in zip(steps, found, strict=True):
        assert_gradients(step, expected.loss)
    # Bounds that do not bind would show nothing.
    assert any(torch.cat(of_step.clipped).any() for of_step in found)
    assert metrics["policy/loss"] == pytest.approx(mean([f.loss.item() for f in found]), rel=1e-3)
    clipped = mean([token_mean(f.clipped) for f in found])
    assert metrics["policy/clip_fraction"] == pytest.approx(clipped, rel=1e-5)
    approx_kl = mean([token_mean([x * x / 2 for x in f.log_ratios]) for f in found])
    assert metrics["policy/approx_kl"] == pytest.approx(approx_kl, rel=1e-3)
    ratio = mean([token_mean(f.ratios) for f in found])
    assert metrics["policy/ratio_mean"] == pytest.approx(ratio, rel=1e-4)
    largest = max(torch.cat(f.ratios).max().item() for f in found)
    assert metrics["policy/ratio_max"] == pytest.approx(largest, rel=1e-4)
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in s.gradients)) for s in steps]
    assert metrics["policy/grad_norm"] == pytest.approx(mean(norms), rel=1e-4)
    if engine.config.ppo.kl_in == "loss":
        kl = mean([token_mean(f.kl) for f in found])
        assert metrics["policy/kl"] == pytest.approx(kl, rel=1e-3)
    else:
        assert "policy/kl" not in metrics


@pytest.mark.parametrize("clip_range", [None, 0.05])
def test_every_step_of_the_critic_is_that_of_the_formula(monkeypatch, clip_range):
    engine = moved_engine(ppo={"epochs": 2, "value_clip_range": clip_range, "gamma": 0.9})
    experience = engine.estimate_advantages(rollout_of(), SCORES)
    mask = experience.rollout.mask
    steps = record(engine, monkeypatch).critic
    metrics = engine.update(experience)
    losses, clipped, norms = [], [], []
    for step in steps:
        rows, bound = [], []
        for b in step.rows:
            own = mask[b]
            values = values_of(step.model, experience.rollout, b)
            old, returns = experience.values[b][own].double(), experience.returns[b][own].double()
            loss = (values - returns).square() / 2
            if clip_range is not None:
                held = old + (values - old).clamp(-clip_range, clip_range)
                bound.append((held - returns).square() / 2 > loss)
                loss = torch.maximum(loss, (held - returns).square() / 2)
            rows.append(loss)
        of_step = torch.cat(rows).mean()
        losses.append(of_step.item())
        clipped.append(token_mean(bound) if bound else 0.0)
        assert_gradients(step, of_step)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in step.gradients)))
    assert len(steps) == 4 and (clip_range is None or clipped[-1] > 0)
    assert metrics["value/loss"] == pytest.approx(mean(losses), rel=1e-4)
    assert metrics["value/clip_fraction"] == pytest.approx(mean(clipped), rel=1e-5)
    assert metrics["value/grad_norm"] == pytest.approx(mean(norms), rel=1e-4)


def test_every_epoch_has_all_rows_in_an_order_of_its_own(monkeypatch):
    engine = moved_engine(ppo={"epochs": 4, "micro_batch_size": 2})
    experience = engine.estimate_advantages(rollout_of(), SCORES)
    steps, taken = record(engine, monkeypatch), []
    inner = engine.actor.update
    monkeypatch.setattr(
        engine.actor,
        "update",
        lambda x, numbers, *more: taken.append(numbers) or inner(x, numbers, *more),
    )
    engine.update(experience)
    # Policy and critic take the same mini-batches, in micro-batches of 2.
    assert [s.passes for s in steps.policy] == [s.passes for s in steps.critic]
    assert [list(map(len, s.passes)) for s in steps.policy] == [[2, 2], [2]] * 4
    assert [sorted(s.rows) for s in steps.policy] == [sorted(numbers) for numbers in taken]
    epochs = [tuple(one + two) for one, two in zip(taken[::2], taken[1::2], strict=True)]
    assert all(sorted(order) == list(range(B)) for order in epochs)
    assert len({*epochs, tuple(range(B))}) == 5
    engine.update(experience)
    later = tuple(taken[8] + taken[9])
    assert sorted(later) == list(range(B)) and later not in epochs


def test_learning_rates_fall_over_all_the_steps_of_a_run(monkeypatch):
    """Each of `steps` has epochs times mini-batches of optimizer steps; the policy has none of
    those in which the critic is warmed up."""
    optimizer = {"learning_rate": 1e-3, "schedule": "linear", "warmup_fraction": 0.25}
    ppo = {"epochs": 2, "critic_warmup_steps": 1}
    engine = moved_engine(ppo=ppo, optimizer=optimizer, steps=3)
    experience = engine.estimate_advantages(rollout_of(), SCORES)
    steps = record(engine, monkeypatch)
    before = [p.detach().clone() for p in engine.policy.model.parameters()]
    shown = []
    for step in range(3):
        shown.append(engine.update(experience)["policy/learning_rate"])
        if step == 0:
            after = list(engine.policy.model.parameters())
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert not steps.policy and len(steps.critic) == 4
    of_policy = [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]  # 8 steps, 2 of them up
    of_critic = [1 / 4, 2 / 4, 3 / 4, *(1 - i / 9 for i in range(9))]  # 12 steps, 3 of them up
    for found, expected in ((steps.policy, of_policy), (steps.critic, of_critic)):
        rates = [step.learning_rate for step in found]
        assert rates == pytest.approx([1e-3 * factor for factor in expected])
    assert shown == pytest.approx([1e-3 * of_policy[i] for i in (0, 0, 4)])
    assert engine.actor.learner.learning_rate == engine.critic.learner.learning_rate == 0


def test_a_gradient_beyond_the_norm_is_scaled_to_it(monkeypatch):
    """Each model's own; the metric is the norm before."""
    optimizer = {"max_grad_norm": 0.1}
    free, held = moved_engine(), moved_engine(optimizer=optimizer)
    norms = {}
    for name, engine in (("free", free), ("held", held)):
        steps = record(engine, monkeypatch)
        metrics = engine.update(engine.estimate_advantages(rollout_of(), SCORES))
        for of_model in steps:
            norm = math.sqrt(sum(float(g.square().sum()) for g in of_model[0].gradients))
            norms.setdefault(name, []).append(norm)
        assert metrics["policy/grad_norm"] > 0.2 and metrics["value/grad_norm"] > 0.2
    assert min(norms["free"]) > 0.2
    assert norms["held"] == pytest.approx([0.1, 0.1], rel=1e-4)


def test_weights_move_by_adams_rule(monkeypatch):
    """The first step of AdamW: rate * g / (|g| + eps), beside the decay of matrices."""
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
    engine = moved_engine(optimizer=optimizer, ppo={"mini_batch_size": 6})
    experience = engine.estimate_advantages(rollout_of(), SCORES)
    steps = record(engine, monkeypatch)
    engine.update(experience)
    models = ((steps.policy, engine.policy.model), (steps.critic, engine.critic.model))
    for (step,), model in models:
        after = list(model.parameters())
        for old, new, g in zip(step.model.parameters(), after, step.gradients, strict=True):
            kept = old * (1 - 1e-2 * 0.1) if old.ndim == 2 else old
            g = g.double()
            expected = kept - 1e-2 * g / (g.abs() + 1e-3)
            torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-6)


def test_equal_seeds_shuffle_alike(monkeypatch):
    orders = []
    for seed in (0, 0, 1):
        engine = moved_engine(seed=seed)
        steps = record(engine, monkeypatch).policy
        torch.manual_seed(len(orders))
        engine.update(engine.estimate_advantages(rollout_of(), SCORES))
        orders.append([step.rows for step in steps])
    assert orders[0] == orders[1] != orders[2]


def test_a_restored_engine_goes_on_alike(monkeypatch):
    """Its weights, schedules, warm-up, order of rows, KL coefficient and score statistics."""
    found = []
    made = {
        "ppo": {"adaptive_kl": AdaptiveKLConfig(horizon=50), "critic_warmup_steps": 2},
        "reward": RewardConfig(normalize=True),
        "optimizer": {"schedule": "linear"},
        "steps": 5,
    }
    one, two = moved_engine(**made), moved_engine(seed=1, **made)
    move(two.policy.model, seed=5)
    for scores in (SCORES, SCORES[::-1], SCORES):
        one.update(one.estimate_advantages(rollout_of(), [3 * s + 1 for s in scores]))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for engine in (one, two):
        assert engine.steps_done == 3 and engine.actor.version == 2
        steps = record(engine, monkeypatch)
        of_engine = []
        for _ in range(2):
            experience = engine.estimate_advantages(rollout_of(), SCORES)
            of_engine.append((experience.scores.tolist(), engine.update(experience)))
        order = [(s.passes, s.learning_rate) for of_model in steps for s in of_model]
        found.append((of_engine, order, engine.kl.coef.item()))
    assert found[0] == found[1]


def test_the_penalty_in_the_loss_weighs_what_the_experience_says():
    """The controller may have moved the coefficient away from the setting."""
    found = []
    for coefficient in (0.4, 0.9):
        engine = moved_engine(ppo={**PENALTY, "mini_batch_size": B})
        experience = engine.estimate_advantages(rollout_of(), SCORES)
        moved = dataclasses.replace(experience, kl_coef=torch.tensor(coefficient))
        found.append(engine.update(moved))
    kl = found[0]["policy/kl"]
    assert kl > 0.01 and found[1]["policy/kl"] == pytest.approx(kl)
    difference = found[1]["policy/loss"] - found[0]["policy/loss"]
    assert difference == pytest.approx(0.5 * kl, rel=1e-3)

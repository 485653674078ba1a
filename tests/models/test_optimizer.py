"""Optimizer groups, learning-rate schedules, gradient clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppo_engine.errors import UserError
from ppo_engine.models.optimizer import Learner, clip_factor, make_optimizer, make_scheduler
from ppo_engine.settings.schema import OptimizerConfig


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def learning_rates(config: OptimizerConfig, steps: int) -> list[float]:
    optimizer = make_optimizer(small_model(), config)
    scheduler = make_scheduler(optimizer, config, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert (optimizer.param_groups[0]["lr"] == 0) == (config.schedule != "constant")
    return rates


def test_only_matrices_decay_and_frozen_weights_are_left_out():
    model = small_model()
    model[0].weight.requires_grad_(False)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name == "2.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_epsilon_and_betas_reach_the_optimizer():
    optimizer = make_optimizer(small_model(), OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-5))
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-5 for g in optimizer.param_groups)


def test_a_wholly_frozen_model_is_an_error():
    with pytest.raises(UserError, match="no parameter to train"):
        make_optimizer(small_model().requires_grad_(False), OptimizerConfig())


def test_linear_schedule_falls_to_zero_after_the_last_step():
    rates = learning_rates(OptimizerConfig(learning_rate=1.0), 4)
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_schedule():
    rates = learning_rates(OptimizerConfig(learning_rate=1.0, schedule="cosine"), 4)
    assert rates == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_warmup_rises_from_above_zero():
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_fraction=0.4)
    assert learning_rates(config, 10) == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_decay_begins_behind_the_warm_up_and_ends_at_zero(schedule):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_fraction=0.5)
    optimizer = make_optimizer(small_model(), config)
    scheduler = make_scheduler(optimizer, config, 8)
    rates = [scheduler.lr_lambdas[0](step) for step in range(12)]
    decay = {"linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.8535534, 0.5, 0.1464466]}[schedule]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *decay, 0, 0, 0, 0])


def test_biases_and_norms_are_trained():
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1, atol=1e-5, rtol=0)


def test_a_learners_step_by_hand():
    """Adam's first step is lr g / (|g| + eps), of the gradient that was clipped."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    config = OptimizerConfig(learning_rate=0.1, eps=1.0, max_grad_norm=0.5)
    learner = Learner(model, config, 4, "the policy")
    assert learner.learning_rate == pytest.approx(0.1)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert learner.step().item() == pytest.approx(5.0)
    moved = torch.tensor([[1 - 0.1 * 0.3 / 1.3, 2 - 0.1 * 0.4 / 1.4]])
    torch.testing.assert_close(model.weight.detach(), moved, atol=1e-5, rtol=0)
    assert model.weight.grad is None
    assert learner.learning_rate == pytest.approx(0.075)
    model.weight.grad = torch.full((1, 2), float("nan"))
    with pytest.raises(UserError, match="the policy, step 2 is not finite"):
        learner.step()


def test_gradients_are_clipped_to_the_norm():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm, factor = clip_factor([parameter], 1.0)
    assert (norm.item(), factor.item()) == pytest.approx((5.0, 0.2))
    assert clip_factor([parameter], 6.0)[1] == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_says_where(bad):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([bad, 1.0])
    with pytest.raises(UserError, match="gradient of the policy, step 7 is not finite"):
        clip_factor([parameter], 1.0, "the policy, step 7")

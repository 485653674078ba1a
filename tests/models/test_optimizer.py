"""Optimizer groups, learning-rate schedules, gradient clipping, masters of weights in bf16."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppo_engine.errors import UserError
from ppo_engine.models.finite import NotFiniteError
from ppo_engine.models.optimizer import Learner, clip_factor, make_optimizer, make_scheduler
from ppo_engine.pretrained.masters import master, to_compute_dtype
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
    optimizer = make_optimizer(
        small_model(), OptimizerConfig(learning_rate=1e-5, beta1=0.8, beta2=0.9)
    )
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


def test_gradients_are_clipped_to_the_norm():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm, factor = clip_factor([parameter], 1.0)
    assert (norm.item(), factor.item()) == pytest.approx((5.0, 0.2))
    assert clip_factor([parameter], 6.0)[1] == 1.0


@pytest.mark.parametrize(
    ("gradient", "losses", "what", "samples"),
    [
        (math.nan, [], "gradient", ()),
        (math.inf, [([4, 1], 0.5), ([2], 1.0)], "gradient", (4, 1, 2)),
        (math.nan, [([4, 1], 0.5), ([2], -math.inf)], "loss", (2,)),
        (1.0, [([4, 1], math.nan), ([2], 1.0)], "loss", (4, 1)),  # finite gradients all the same
    ],
)
def test_numbers_that_are_not_finite_change_nothing(gradient, losses, what, samples):
    learner = steps(trained(BF16, seed=0), 0, 1)
    before, rate = [x.clone() for x in state_of(learner)], learner.learning_rate
    for parameter in learner.model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    with pytest.raises(
        NotFiniteError, match=f"The {what} of the model .update 2. is not"
    ) as caught:
        learner.step([(of, torch.tensor(loss)) for of, loss in losses])
    assert caught.value.samples == samples and learner.begun == 1
    assert same(state_of(learner), before) and learner.learning_rate == rate
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_weights_that_are_not_finite_end_a_run():
    learner = steps(trained(F32, seed=0), 0, 1)
    learner.refuse_bad_weights(1)
    with torch.no_grad():
        learner.model["inner"].weight[1, 1] = -math.inf
    with pytest.raises(
        UserError, match=r"Step 2 has made weights of the model .*finite: inner\.weight"
    ):
        learner.refuse_bad_weights(2)
    learner.model["inner"].weight.requires_grad_(False)
    learner.refuse_bad_weights(3)


# --- Weights in bf16 ------------------------------------------------------------------------------

F32, BF16 = torch.float32, torch.bfloat16


def trained(dtype: torch.dtype, seed: int = 0) -> Learner:
    """One layer of it stays fp32, as a score head does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Sizes that fill vectors: the end of a tensor torch rounds otherwise.
        model = nn.ModuleDict({"inner": nn.Linear(64, 64), "score": nn.Linear(64, 1, bias=False)})
    config = OptimizerConfig(
        learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1e-2, warmup_fraction=0.0
    )
    return Learner(to_compute_dtype(model, dtype), config, 40, "the model")


def gradients(step: int) -> list[Tensor]:
    """Small ones are not clipped; representable in bf16."""
    generator = torch.Generator().manual_seed(step)
    size = 1e-6 if step % 3 else 1.0
    shapes = ((64, 64), (64,), (1, 64))
    return [(torch.randn(s, generator=generator) * size).bfloat16() for s in shapes]


def steps(learner: Learner, begin: int, end: int) -> Learner:
    for step in range(begin, end):
        for parameter, gradient in zip(learner.model.parameters(), gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        learner.step()
    return learner


def state_of(learner: Learner) -> list[Tensor]:
    """Masters and moments."""
    states = learner.optimizer.state
    parameters = [*learner.model.parameters()]
    moments = [states[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
    assert {x.dtype for x in moments} == {F32}
    return [*map(master, parameters), *moments]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch has no fused multiply-add on this CPU",
)
def test_masters_go_where_fp32_weights_go():
    """For 30 steps in every bit: as in fp32, and as torch's AdamW takes them there."""
    ours, in_fp32 = (steps(trained(dtype), 0, 30) for dtype in (BF16, F32))
    assert {p.dtype for p in ours.model["inner"].parameters()} == {BF16}
    assert ours.model["score"].weight.dtype == F32
    assert same(state_of(ours), state_of(in_fp32))
    for inner in ours.model["inner"].parameters():  # rounded to nearest, of two as near up
        assert (inner - master(inner)).abs().max() <= 2**-8 * inner.abs().max()

    theirs = trained(F32).model
    optimizer = torch.optim.AdamW(
        make_optimizer(theirs, ours.config).param_groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5,
        fused=True,
    )  # fmt: skip
    for step in range(30):
        for parameter, gradient in zip(theirs.parameters(), gradients(step), strict=True):
            parameter.grad = gradient.float()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1e-2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 40)
        optimizer.step()
    assert same(state_of(in_fp32)[:3], [p.detach() for p in theirs.parameters()])


@pytest.mark.parametrize("before", [F32, BF16], ids=str)
@pytest.mark.parametrize("after", [F32, BF16], ids=str)
def test_a_run_goes_on_exactly_in_either_dtype(before, after):
    saved = steps(trained(before), 0, 10).state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    resumed = trained(after, seed=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(state_of(steps(resumed, 10, 20)), state_of(steps(trained(before), 0, 20)))


@pytest.mark.parametrize("before", [0, 3])
def test_a_state_can_be_gone_back_to_more_than_once(before):
    """Also to that before the first step, without moments; and it does not move with the steps that
    follow."""
    learner = steps(trained(F32), 0, before)
    state = copy.deepcopy(learner.state_dict())
    ends = []
    for _ in range(3):
        learner.load_state_dict(state)
        ends.append([x.clone() for x in state_of(steps(learner, before, before + 3))])
    assert all(same(end, ends[0]) for end in ends)


def test_a_checkpoint_of_torchs_adamw_goes_on_too():
    """As those of before there were masters."""
    learner = trained(F32)
    theirs = torch.optim.AdamW(learner.optimizer.param_groups, lr=1e-2)
    steps(learner, 0, 3)
    state: dict[str, Any] = learner.state_dict()
    groups = theirs.state_dict()["param_groups"]
    old = {place: {**s, "step": torch.tensor(3.0)} for place, s in
           state["optimizer"]["state"].items()}  # fmt: skip
    state = copy.deepcopy({k: v for k, v in state.items() if k != "remainders"})
    state["optimizer"] = {"state": copy.deepcopy(old), "param_groups": copy.deepcopy(groups)}
    resumed = trained(BF16, seed=1)
    resumed.load_state_dict(state)
    assert same(state_of(steps(resumed, 3, 6)), state_of(steps(learner, 3, 6)))


def test_the_norm_of_gradients_in_bf16_is_not_rounded():
    parameter = nn.Parameter(torch.zeros(1000, dtype=BF16))
    parameter.grad = torch.ones(1000, dtype=BF16)
    norm, _ = clip_factor([parameter, nn.Parameter(torch.zeros(2))], 1.0)
    assert norm.dtype == F32 and norm.item() == pytest.approx(1000**0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_8_bits_follow_fp32_ones_and_go_on_exactly(dtype):
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 1))
    x = torch.randn(256, 96)
    target = x[:, :4].sum(1, keepdim=True)

    def learner(moments: str) -> Learner:
        model = to_compute_dtype(copy.deepcopy(start), dtype)
        config = OptimizerConfig(learning_rate=3e-3, moments=moments)
        return Learner(model, config, 400, "the model")

    def train(made: Learner, steps: int) -> float:
        for _ in range(steps):
            loss = (made.model(x.to(dtype)).float() - target).square().mean()
            loss.backward()
            made.step()
        return loss.item()

    exact, small = learner("float32"), learner("8bit")
    losses = [train(made, 60) for made in (exact, small)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[0] < 2
    sizes = {
        sum(x.nbytes for x in made.optimizer.state[made.model[0].weight].values() if x is not None
            and isinstance(x, Tensor))
        for made in (exact, small)
    }  # fmt: skip
    assert sizes == {96 * 64 * 8, 96 * 64 * 2 + 2 * 24 * 4}
    saved = io.BytesIO()
    torch.save(small.state_dict(), saved)
    again = learner("8bit")
    again.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert train(again, 20) == train(small, 20)
    for a, b in zip(again.model.parameters(), small.model.parameters(), strict=True):
        assert torch.equal(master(a), master(b))

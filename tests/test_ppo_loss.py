"""`ppo_policy_loss` and `ppo_value_loss`: every implementation against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops import (
    MASKS,
    assert_error_rule,
    assert_same_bits,
    cu_seqlens_of,
    implementations_of,
    make_mask,
    pack,
    poison,
    run,
    shapes,
    views,
)
from torch import Tensor

from ppo_kernels import dispatch, ppo_loss, ppo_policy_loss, ppo_value_loss, reference

IMPLS = pytest.mark.parametrize("impl", implementations_of("ppo_policy_loss"))
KERNELS = pytest.mark.parametrize(
    "kernel", implementations_of("ppo_policy_loss", but=("reference",))
)
REDUCTIONS = pytest.mark.parametrize("reduction", ppo_loss.REDUCTIONS)
NEEDS_CPP = pytest.mark.skipif(dispatch.cpu is None, reason="the C++ extension is not built")
OPS = {"ppo_policy_loss": ppo_policy_loss, "ppo_value_loss": ppo_value_loss}
WRT = {"ppo_policy_loss": ("logprobs", "entropy"), "ppo_value_loss": ("values",)}
BOTH = pytest.mark.parametrize("op", list(OPS))
INF, NAN = math.inf, math.nan


def arguments(op: str, shape: tuple[int, ...], mask: Tensor | None = None) -> dict[str, Any]:
    """Random arguments that reach every branch: clips, dual clip, whitening, entropy, KL.

    The values have a mean: the error rule knows nothing of the terms of a sum that cancels. The
    fuzz has those, with bounds by their magnitude.
    """
    x = [torch.randn(shape) for _ in range(6)]
    if op == "ppo_value_loss":
        values = x[0] + 0.5
        given = {"values": values, "old_values": values + 0.3 * x[1], "returns": 100 + x[2]}
    else:
        given = {
            "logprobs": x[0] - 3,
            "old_logprobs": x[0] - 3 + 0.4 * x[1],
            "advantages": x[2],
            "ref_logprobs": x[0] - 3 + 0.1 * x[3],
            "entropy": x[4].abs(),
            "is_weights": x[5].exp(),
        }
    given = {name: poison(y, mask) for name, y in given.items()} | {"mask": mask}
    if op == "ppo_policy_loss":
        given |= {"clip_range": (0.2, 0.28), "dual_clip": 1.3, "entropy_coef": 0.01, "kl_coef": 0.1}
        given |= {"moments": torch.tensor([10.0, 0.2, 9.0])}
    return given


def as_dtype(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


# --- By hand --------------------------------------------------------------------------------------

# ratio, advantage, loss, d loss / d log pi, with clip_range 0.25 and dual clip 3
CASES = [
    (1.0, 2.0, -2.0, -2.0),  # pi = pi_old: the gradient is -A
    (1.5, 2.0, -2.5, 0.0),  # already likelier, and good: held at 1.25
    (0.5, 2.0, -1.0, -1.0),  # good, yet less likely: pulled back
    (0.5, -2.0, 1.5, 0.0),  # already less likely, and bad: held at 0.75
    (1.5, -2.0, 3.0, 3.0),  # bad, yet likelier: pushed down
    (8.0, -2.0, 6.0, 0.0),  # far off: the dual clip, 3 * 2
    (1.5, 0.0, 0.0, 0.0),
]


@IMPLS
def test_policy_by_hand(impl: str) -> None:
    ratio, advantages, expected, slopes = torch.tensor(CASES, dtype=torch.float64).T
    logprobs = ratio.log()[None].requires_grad_()
    loss, stats = ppo_policy_loss(
        logprobs, torch.zeros(1, 7), advantages[None], clip_range=0.25, dual_clip=3.0, impl=impl,
        reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.sum())
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0][0], slopes)
    assert stats.clip_fraction == 2 / 7
    torch.testing.assert_close(stats.ratio_mean, ratio.mean())
    torch.testing.assert_close(stats.ratio_max, ratio.max())
    torch.testing.assert_close(stats.approx_kl, (ratio.log() ** 2).mean() / 2)


@IMPLS
def test_policy_terms_by_hand(impl: str) -> None:
    # rho = 1. Moments: mean 1, variance 16/4, so A = (5 - 1)/2 = 2; policy term 3 * -2 = -6.
    # k1 = log 2: k3 = 1/2 - 1 + log 2, slope 1 - 1/2. Entropy 7, coefficient 1/10.
    logprobs = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
    entropy = torch.full((1, 1), 7.0, dtype=torch.float64, requires_grad=True)
    loss, stats = ppo_policy_loss(
        logprobs, logprobs, torch.full((1, 1), 5.0), entropy=entropy, entropy_coef=0.1,
        ref_logprobs=logprobs.detach() - math.log(2), kl_coef=10.0, impl=impl,
        is_weights=torch.full((1, 1), 3.0), moments=torch.tensor([4.0, 1.0, 16.0]),
    )  # fmt: skip
    k3 = math.log(2) - 0.5
    torch.testing.assert_close(loss.item(), -6 + 10 * k3 - 0.7, rtol=1e-7, atol=0)
    gradients = torch.autograd.grad(loss, (logprobs, entropy))
    torch.testing.assert_close([g.item() for g in gradients], [-6 + 5.0, -0.1], rtol=1e-7, atol=0)
    torch.testing.assert_close([stats.kl.item(), stats.entropy.item()], [k3, 7.0])


@IMPLS
def test_reductions_by_hand(impl: str) -> None:
    """Advantages -1 to -6 at ratio 1 are losses 1 to 6; two in one row, one in another, none."""
    logprobs = torch.zeros(3, 3)
    advantages = -torch.tensor([[1.0, 3.0, NAN], [6.0, INF, NAN], [NAN, NAN, INF]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()

    def loss(**options: Any) -> float:
        result, _ = ppo_policy_loss(
            logprobs, logprobs, advantages, mask=mask, impl=impl, **options
        )  # fmt: skip
        return result.item()

    assert loss() == pytest.approx(10 / 3)
    assert loss(normalizer=4) == 10 / 4
    assert loss(reduction="sequence_mean") == (2 + 6) / 2
    assert loss(reduction="sequence_mean", normalizer=torch.tensor(4)) == 8 / 4
    assert loss(reduction="sum") == 10
    assert loss(reduction="sum", normalizer=4.0) == 10 / 4
    assert loss(normalizer=torch.tensor(0)) == 10  # a denominator of 0 counts as 1


@IMPLS
def test_value_by_hand(impl: str) -> None:
    # clip 1/2. Errors 1, 2 and -3; the second is clipped to V = 0.5, an error of 1.5 < 2; the third
    # to V = 0.5, an error of -3.5: the larger loss, whose gradient is 0.
    values = torch.tensor([[3.0, 1.0, 1.0]], requires_grad=True)
    old_values = torch.tensor([[3.0, 0.0, 0.0]])
    returns = torch.tensor([[2.0, -1.0, 4.0]])
    loss, stats = ppo_value_loss(values, old_values, returns, clip_range=0.5, impl=impl)
    assert loss.item() == pytest.approx((1 + 4 + 3.5**2) / 2 / 3)
    torch.testing.assert_close(
        torch.autograd.grad(loss, values)[0], torch.tensor([[1.0, 2.0, 0.0]]) / 3
    )
    expected = (1 / 3, 5 / 3, 5 / 3, 14 / 3, 21 / 3 - (5 / 3) ** 2)
    assert [x.item() for x in stats] == pytest.approx(expected)
    loss, stats = ppo_value_loss(values, old_values, returns, clip_range=None, impl=impl)
    assert loss.item() == pytest.approx((1 + 4 + 9) / 2 / 3)
    assert stats.clip_fraction == 0


# --- Against float64 ------------------------------------------------------------------------------


@KERNELS
@BOTH
@REDUCTIONS
@pytest.mark.parametrize("kind", MASKS)
def test_error_rule(kernel: str, op: str, reduction: str, kind: str) -> None:
    interpreted = [(0, 2), (1, 1), (3, 2), (5, 31), (7, 1025)]  # slowly: fewer
    for shape in interpreted if kernel == "triton" else shapes():
        given = arguments(op, shape, make_mask(kind, shape)) | {"reduction": reduction}
        assert_error_rule(OPS[op], getattr(reference, op), given, WRT[op], impl=kernel)


@KERNELS
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_error_rule_in_other_dtypes(kernel: str, op: str, dtype: torch.dtype) -> None:
    for estimator in ("k1", "k2", "k3"):
        given = as_dtype(arguments(op, (7, 129), make_mask("interior", (7, 129))), dtype)
        if op == "ppo_policy_loss":
            given["kl_estimator"] = estimator
        assert_error_rule(OPS[op], getattr(reference, op), given, WRT[op], impl=kernel)


@KERNELS
def test_error_rule_of_small_kl(kernel: str) -> None:
    """k3 of log-ratios around 1e-4 keeps its digits: nothing cancels."""
    given = arguments("ppo_policy_loss", (3, 1000)) | {"entropy_coef": 0.0, "kl_coef": 1.0}
    given["ref_logprobs"] = given["logprobs"] + 1e-4 * torch.randn(3, 1000)
    given["advantages"] = torch.zeros(3, 1000)
    given["moments"] = None
    wrt = WRT["ppo_policy_loss"]
    assert_error_rule(ppo_policy_loss, reference.ppo_policy_loss, given, wrt, impl=kernel)


@NEEDS_CPP
def test_sums_of_many_equal_terms() -> None:
    """float32 is added up over a tile at most: over a block, the same rounding would accumulate."""
    one = torch.full((1, 1), 0.1)
    for tokens in (256, 8192, 100_000):
        many = one.expand(1, tokens)
        for got, alone in zip(
            ppo_policy_loss(many, 0 * many, -many), ppo_policy_loss(one, 0 * one, -one), strict=True
        ):
            torch.testing.assert_close(got, alone, rtol=6e-7, atol=0)


@IMPLS
def test_mixed_dtypes_promote(impl: str) -> None:
    given = arguments("ppo_policy_loss", (2, 9))
    given["advantages"] = given["advantages"].bfloat16()
    given["old_logprobs"] = given["old_logprobs"].double()
    given["logprobs"] = given["logprobs"].half().requires_grad_()
    loss, _ = ppo_policy_loss(**given, impl=impl)
    exact, _ = ppo_policy_loss(**as_dtype(given, torch.float64), impl="reference")
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, exact)
    loss.backward()
    assert given["logprobs"].grad.dtype == torch.float16


# --- Layouts --------------------------------------------------------------------------------------


@IMPLS
@BOTH
@REDUCTIONS
def test_packed_is_padded(op: str, reduction: str, impl: str) -> None:
    """With int32 and int64 boundaries, with and without a mask over the packed tokens."""
    mask = make_mask("right", (13, 9))
    assert mask is not None
    keep = mask & torch.rand(13, 9).gt(0.2)
    given = arguments(op, (13, 9), keep) | {"reduction": reduction}
    expected = run(OPS[op], given | {"impl": impl}, WRT[op])
    assert not expected[f"gradient of {WRT[op][0]}"][~keep].any()
    for held, dtype in ((keep, torch.int32), (mask, torch.int64)):
        packed = {
            name: pack(x, held) if isinstance(x, Tensor) and x.shape == held.shape else x
            for name, x in given.items()
        }
        packed |= {"cu_seqlens": cu_seqlens_of(held, dtype), "impl": impl}
        for name, x in run(OPS[op], packed, WRT[op]).items():
            wanted = expected[name]
            torch.testing.assert_close(x, wanted[held] if wanted.shape == held.shape else wanted)


@IMPLS
@BOTH
@REDUCTIONS
@pytest.mark.parametrize("shape", [(5, 37), (1, 40), (40, 1)])
def test_strides_do_not_matter(op: str, reduction: str, impl: str, shape: tuple[int, int]) -> None:
    given = arguments(op, shape, make_mask("interior", shape)) | {"reduction": reduction}
    expected = run(OPS[op], given | {"impl": impl}, WRT[op])
    for moved in [name for name, x in given.items() if getattr(x, "shape", ()) == shape]:
        if moved == "mask":
            mask = given["mask"]
            others = [("transposed", mask.t().contiguous().t()),
                      ("every second", mask.repeat_interleave(2, 1)[:, ::2])]  # fmt: skip
        else:
            others = list(views(given[moved]))
        for name, x in others:
            result = run(OPS[op], given | {moved: x, "impl": impl}, WRT[op])
            for output, y in result.items():
                torch.testing.assert_close(
                    y, expected[output], msg=lambda m, v=(moved, name, output): f"{v}: {m}"
                )


@IMPLS
@BOTH
def test_expanded_views(op: str, impl: str) -> None:
    """Stride 0: one number per sequence, and one for all."""
    given = arguments(op, (4, 21)) | {"impl": impl}
    name = "advantages" if op == "ppo_policy_loss" else "returns"
    for small in (torch.randn(4, 1), torch.randn(1, 21), torch.randn(1, 1)):
        view = small.expand(4, 21)
        expected = run(OPS[op], given | {name: view.clone()}, WRT[op])
        for output, y in run(OPS[op], given | {name: view}, WRT[op]).items():
            torch.testing.assert_close(y, expected[output])


@IMPLS
@BOTH
def test_tokens_without_boundaries(op: str, impl: str) -> None:
    """A flat batch is fine where nothing depends on its sequences."""
    given = arguments(op, (1, 50)) | {"impl": impl}
    expected = run(OPS[op], given)
    flat = {n: x[0] if getattr(x, "shape", ()) == (1, 50) else x for n, x in given.items()}
    for output, x in run(OPS[op], flat).items():
        torch.testing.assert_close(x, expected[output])
    with pytest.raises(ValueError, match=r"must be \[B, T\], or \[N\] with cu_seqlens"):
        OPS[op](**flat, reduction="sequence_mean")


# --- What PPO relies on ---------------------------------------------------------------------------


@IMPLS
@BOTH
@REDUCTIONS
def test_micro_batches_add_up(op: str, reduction: str, impl: str) -> None:
    mask = make_mask("interior", (8, 11))
    assert mask is not None
    given = as_dtype(arguments(op, (8, 11), mask), torch.float64)
    given |= {"reduction": reduction, "impl": impl}
    counts = {"token_mean": mask.sum(), "sequence_mean": mask.any(1).sum(), "sum": torch.tensor(1)}
    expected = run(OPS[op], given, WRT[op])
    for size in (1, 3, 8):
        parts = []
        for rows in torch.arange(8).split(size):
            part = {n: x[rows] if getattr(x, "shape", ()) == mask.shape else x
                    for n, x in given.items()}  # fmt: skip
            parts.append(run(OPS[op], part | {"normalizer": counts[reduction]}, WRT[op]))
        torch.testing.assert_close(sum(p["output.0"] for p in parts), expected["output.0"])
        for name in (f"gradient of {x}" for x in WRT[op]):
            torch.testing.assert_close(torch.cat([p[name] for p in parts]), expected[name])


@IMPLS
@pytest.mark.parametrize("clip_range", [0.2, 0.0])
def test_first_minibatch(impl: str, clip_range: float) -> None:
    """Every ratio is exactly 1, nothing is clipped, and the gradient is exactly -A."""
    logprobs = (-10 * torch.rand(9, 33)).requires_grad_()
    advantages = torch.randn(9, 33)
    loss, stats = ppo_policy_loss(
        logprobs, logprobs.detach(), advantages, ref_logprobs=logprobs, kl_coef=0.1, impl=impl,
        reduction="sum", clip_range=clip_range,
    )  # fmt: skip
    assert torch.equal(torch.autograd.grad(loss, logprobs)[0], -advantages)
    assert [x.item() for x in stats] == [0, 0, 1, 1, 0, 0]


@IMPLS
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_extreme_log_ratios(impl: str, estimator: str) -> None:
    """The log-ratio is held at +-20: the ratio is finite, and beyond it nothing pulls."""
    logprobs = torch.tensor([[-1e4, -50.0, -20.0, 0.0, 20.0, 50.0, 1e4]], requires_grad=True)
    zeros = torch.zeros(1, 7)
    loss, stats = ppo_policy_loss(
        logprobs, zeros, -torch.ones(1, 7), ref_logprobs=zeros, kl_estimator=estimator, impl=impl,
        kl_coef=0.0,
    )  # fmt: skip
    assert loss.isfinite()
    torch.testing.assert_close(stats.ratio_max, torch.tensor(20.0).exp())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.isfinite().all()
    assert gradient[0, [0, 1, 5, 6]].tolist() == [0] * 4
    k = {"k1": logprobs, "k2": logprobs**2 / 2}.get(estimator)
    if k is None:
        held = logprobs.clamp(-20, 20)
        k = (-held).expm1() + held
    torch.testing.assert_close(stats.kl, k.detach().mean())
    if estimator == "k3":
        (slope,) = torch.autograd.grad(
            ppo_policy_loss(logprobs, logprobs.detach(), zeros, ref_logprobs=zeros, kl_coef=7.0,
                            impl=impl)[0], logprobs)  # fmt: skip
        assert slope[0, [0, 1, 5, 6]].tolist() == [0] * 4
        torch.testing.assert_close(slope[0, 4], torch.tensor(1.0))  # 7/7 (1 - e^-20)


@IMPLS
@BOTH
def test_nan_in_a_real_token_shows(op: str, impl: str) -> None:
    given = arguments(op, (2, 21)) | {"impl": impl}
    for name, x in given.items():
        # The clipped value loss falls back on the unclipped one where V_old is NaN.
        if getattr(x, "shape", ()) == (2, 21) and name != "old_values":
            bad = x.clone()
            bad[1, 3] = NAN
            assert OPS[op](**given | {name: bad})[0].isnan(), name
    if op == "ppo_policy_loss":
        bad = given["logprobs"].clone()
        bad[1, 3] = NAN
        assert ppo_policy_loss(**given | {"logprobs": bad})[1].ratio_max.isnan()


@IMPLS
@BOTH
def test_only_the_trained_inputs_have_gradients(op: str, impl: str) -> None:
    given = arguments(op, (2, 5)) | {"impl": impl}
    leaves = {n: x.requires_grad_() for n, x in given.items()
              if isinstance(x, Tensor) and x.is_floating_point()}  # fmt: skip
    loss, stats = OPS[op](**given)
    loss.backward()
    assert {name for name, x in leaves.items() if x.grad is not None} == set(WRT[op])
    assert not any(x.requires_grad or x.ndim for x in stats)


@IMPLS
def test_backward_twice_and_scaled(impl: str) -> None:
    """Loss scaling in float16 keeps what an unscaled gradient would lose."""
    logprobs = torch.zeros(1, 100, dtype=torch.float16, requires_grad=True)
    loss, _ = ppo_policy_loss(
        logprobs, logprobs, torch.full((1, 100), 1e-6), normalizer=1e3, impl=impl
    )  # fmt: skip
    (loss * 2.0**20).backward(retain_graph=True)
    once = logprobs.grad.clone()
    torch.testing.assert_close(once, torch.full_like(once, -(2.0**20) * 1e-9))
    (loss * 2.0**20).backward()
    assert torch.equal(logprobs.grad, 2 * once)


@IMPLS
@BOTH
@REDUCTIONS
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (3, 5)])
def test_nothing_real(op: str, reduction: str, impl: str, shape: tuple[int, int]) -> None:
    given = arguments(op, shape, make_mask("empty", shape)) | {"reduction": reduction}
    for name, x in run(OPS[op], given | {"impl": impl}, WRT[op]).items():
        assert not x.any(), name  # NaN would be true


# --- Threads, graphs ------------------------------------------------------------------------------


@NEEDS_CPP
@BOTH
@REDUCTIONS
@pytest.mark.parametrize("shape", [(31, 4001), (3, 40_000)])
def test_threads_do_not_change_a_bit(op: str, reduction: str, shape: tuple[int, int]) -> None:
    given = arguments(op, shape, make_mask("interior", shape)) | {"reduction": reduction}
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(run(OPS[op], given | {"impl": "cpp"}, WRT[op]))
    for result in results[1:]:
        assert_same_bits(results[0], result)


@NEEDS_CPP
def test_opcheck() -> None:
    mask = make_mask("interior", (3, 5))
    x = arguments("ppo_policy_loss", (3, 5), mask)
    logprobs, entropy = x["logprobs"].requires_grad_(), x["entropy"].requires_grad_()
    tensors = (logprobs, entropy, x["old_logprobs"], x["advantages"], x["ref_logprobs"],
               x["is_weights"], mask, None, x["moments"])  # fmt: skip
    numbers = torch.tensor([0.2, 0.3, INF, 0.1, 0.1], dtype=torch.float64)
    normalizer = torch.tensor(4.0)
    torch.library.opcheck(
        ppo_loss._policy_op,
        (*tensors, numbers, normalizer, "sequence_mean", "k3", "clip", "token", "cpp", True, True),
    )
    v = arguments("ppo_value_loss", (3, 5), mask)
    values = v["values"].requires_grad_()
    torch.library.opcheck(
        ppo_loss._value_op,
        (values, v["old_values"], v["returns"], mask, None, torch.tensor(0.2), None, "token_mean",
         "cpp", True),
    )  # fmt: skip


@NEEDS_CPP
def test_compile_without_breaks_or_recompiles() -> None:
    """New coefficients cost no new graph after the second; results are those of eager mode."""
    mask = make_mask("interior", (3, 7))
    policy, value = (arguments(op, (3, 7), mask) for op in OPS)
    leaves = (policy["logprobs"].requires_grad_(), value["values"].requires_grad_())

    def losses(clip: float, normalizer: float, coef: float) -> tuple[Tensor, ...]:
        given = policy | {"logprobs": leaves[0] * 1.0, "clip_range": clip}
        given |= {"normalizer": normalizer, "kl_coef": coef, "entropy_coef": coef}
        a, stats = ppo_policy_loss(**given)
        b, _ = ppo_value_loss(**value | {"clip_range": clip, "normalizer": normalizer})
        return a + 2 * b, *stats

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for i in range(4):
        numbers = (0.2 + 0.01 * i, 3.0 + i, 0.1 + 0.1 * i)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            got = compiled(*numbers)
        expected = losses(*numbers)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got[0], leaves), torch.autograd.grad(expected[0], leaves)
        )

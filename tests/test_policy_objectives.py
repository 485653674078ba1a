"""The policy loss with the ratio of a sequence (GSPO) and with CISPO's objective, and both: every
implementation against formulas written out here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import ops
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ppo_kernels import dispatch, linear_ppo_loss, ppo_loss, ppo_policy_loss, reference

NEW = [("clip", "sequence"), ("cispo", "token"), ("cispo", "sequence")]
WRT = ("logprobs", "entropy")
NAN = math.nan
NEEDS_CPP = pytest.mark.skipif(dispatch.cpu is None, reason="the C++ extension is not built")
REDUCTIONS = pytest.mark.parametrize("reduction", ppo_loss.REDUCTIONS)


@pytest.fixture(params=ops.implementations_of("ppo_policy_loss"))
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ops.implementations_of("ppo_policy_loss", but=("reference",)))
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=NEW, ids=" of ".join)
def of(request: pytest.FixtureRequest) -> dict[str, str]:
    """What is new, in one of its forms."""
    return dict(zip(("objective", "ratio_level"), request.param, strict=True))


def arguments(
    of: dict[str, str], shape: tuple[int, int] = (7, 9), mask: Tensor | None = None, **more: Any
) -> dict[str, Any]:
    """Random ones that reach every branch: whole sequences on either side of the clip range, and
    one beyond the clamp. The terms of the loss have a mean, as in test_ppo_loss.py."""
    noise, off = torch.randn(5, *shape), 0.4 * torch.randn(shape[0], 1)
    off[2:3] = 25.0
    given = {
        "logprobs": noise[0] - 3,
        "old_logprobs": noise[0] - 3 + off + 0.2 * noise[1],
        "advantages": noise[2] + 1.5,
        "ref_logprobs": noise[0] - 3 + noise[3],
        "entropy": noise[4].abs() + 0.1,
        "is_weights": noise[3].exp(),
    }
    given = {name: ops.poison(x, mask) for name, x in given.items()} | {"mask": mask} | of
    given |= {"clip_range": (0.2, 0.28), "entropy_coef": 0.01, "kl_coef": 0.1} | more
    given["moments"] = torch.tensor([10.0, 0.2, 9.0])
    return given | ({"dual_clip": 1.3} if of["objective"] == "clip" else {})


def packed(given: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    found = {
        name: x[keep] if isinstance(x, Tensor) and x.shape == keep.shape else x
        for name, x in given.items()
    }
    return found | {"cu_seqlens": ops.cu_seqlens_of(keep)}


# --- Written out ----------------------------------------------------------------------------------


def written_out(given: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of padded tokens: the loss; a number with its gradient, by autograd; the statistics.

    Sequence by sequence, of its real tokens only.
    """
    sequence, cispo = given["ratio_level"] == "sequence", given["objective"] == "cispo"
    low, high = given["clip_range"]
    _, mean, m2 = given["moments"].tolist()
    per_sequence = []
    for b, real in enumerate(given["mask"]):
        if not real.any():
            continue
        log_p, old, a, ref, h, w = (
            given[name][b][real]
            for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy",
                         "is_weights")
        )  # fmt: skip
        a = (a - mean) / (m2 / 10 + 1e-8) ** 0.5
        log_ratio = (log_p - old).detach()
        used = log_ratio.mean().expand(log_ratio.shape) if sequence else log_ratio
        rho = used.clamp(-20, 20).exp()
        clipped = rho.clamp(1 - low, 1 + high)
        if cispo:
            value, slope = -clipped * a * log_p.detach(), -clipped * a
            outside = clipped != rho
        else:
            value = torch.maximum(-a * rho, -a * clipped)
            outside = -a * clipped > -a * rho
            bounded = (a < 0) & (value > -1.3 * a)
            value = torch.where(bounded, -1.3 * a, value)
            slope = torch.where(outside | bounded | (used.abs() > 20), 0, -a * rho)
        k3 = (ref - log_p).expm1() - (ref - log_p)
        rest = 0.1 * k3 - 0.01 * h
        per_sequence.append(
            (w * value + rest, w * slope * log_p + rest, log_ratio**2 / 2, outside.double(), rho,
             k3, h)
        )  # fmt: skip
    columns = list(zip(*per_sequence, strict=True))
    token = [torch.cat(column) for column in columns]
    names = ("approx_kl", "clip_fraction", "ratio_mean", "kl", "entropy")
    stats = {name: x.mean() for name, x in zip(names, token[2:], strict=True)}
    stats["ratio_max"] = token[4].max()
    reduced = {
        "token_mean": lambda of: torch.cat(of).mean(),
        "sequence_mean": lambda of: torch.stack([x.mean() for x in of]).mean(),
        "sum": lambda of: torch.cat(of).sum(),
    }[given["reduction"]]
    return reduced(columns[0]), reduced(columns[1]), stats


@REDUCTIONS
@pytest.mark.parametrize("layout", ["right", "interior", "packed", "packed and masked"])
def test_by_its_formula(impl: str, of: dict[str, str], reduction: str, layout: str) -> None:
    keep = ops.make_mask("interior" if layout == "interior" else "right", (7, 9))
    assert keep is not None
    keep[5] = False  # a sequence without any token
    mask = keep & (torch.rand(7, 9) < 0.7) if layout == "packed and masked" else keep
    given = ops.in_dtype(arguments(of, mask=mask, reduction=reduction), torch.float64)
    leaves = [given[name].requires_grad_() for name in WRT]
    loss, with_gradient, stats = written_out(given)
    expected = {f"output.1.{name}": x.detach() for name, x in stats.items()}
    expected["output.0"] = loss.detach()
    for name, g in zip(WRT, torch.autograd.grad(with_gradient, leaves), strict=True):
        expected[f"gradient of {name}"] = g[keep] if layout.startswith("packed") else g
    if layout == "packed":
        given = packed(given, keep) | {"mask": None}
    elif layout == "packed and masked":
        given = packed(given, keep)
    found = ops.run(partial(ppo_policy_loss, impl=impl), given, WRT)
    torch.testing.assert_close(found, {name: expected[name] for name in found})
    assert 0 < found["output.1.clip_fraction"] < 1


@REDUCTIONS
def test_of_constant_advantages_it_is_the_gradient_of_gspo(impl: str, reduction: str) -> None:
    """All of s_i differentiated, as GSPO has it."""
    mask = ops.make_mask("interior", (7, 9))
    assert mask is not None
    logprobs = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() + 0.3 * torch.randn(7, 1)
    advantages = torch.randn(7, 1).expand(7, 9)
    loss, _ = ppo_policy_loss(
        logprobs, old, advantages, mask=mask, ratio_level="sequence", reduction=reduction, impl=impl
    )
    tokens = mask.sum(1, keepdim=True)
    s = (((logprobs - old) * mask).sum(1, keepdim=True) / tokens.clamp(min=1)).exp().expand(7, 9)
    of_tokens = torch.maximum(-advantages * s, -advantages * s.clamp(0.8, 1.2)) * mask
    weights = {"token_mean": 1 / mask.sum(), "sum": torch.ones(()),
               "sequence_mean": 1 / tokens.clamp(min=1) / (tokens > 0).sum()}  # fmt: skip
    expected = (of_tokens * weights[reduction]).sum()
    torch.testing.assert_close(loss, expected)
    both = [torch.autograd.grad(x, logprobs)[0] for x in (loss, expected)]
    torch.testing.assert_close(*both)
    assert both[0].any()


def test_cispo_by_hand(impl: str) -> None:
    # ratios 1, 2 and 1/2, held in [3/4, 5/4]; log pi = -1; advantages 2, 2 and -2
    old = torch.tensor([[-1.0, -1.0 - math.log(2), -1.0 + math.log(2)]])
    logprobs = torch.full((1, 3), -1.0, requires_grad=True)
    advantages = torch.tensor([[2.0, 2.0, -2.0]])
    given = (logprobs, old, advantages)
    loss, stats = ppo_policy_loss(
        *given, objective="cispo", clip_range=0.25, reduction="sum", impl=impl
    )
    assert loss.item() == pytest.approx(2 + 2.5 - 1.5)
    slopes = torch.autograd.grad(loss, logprobs)[0][0]
    torch.testing.assert_close(slopes, torch.tensor([-2.0, -2.5, 1.5]))
    assert stats.clip_fraction.item() == pytest.approx(2 / 3)
    # No lower bound: the last weighs 1/2.
    loss, _ = ppo_policy_loss(
        *given, objective="cispo", clip_range=(1.0, 0.25), reduction="sum", impl=impl
    )
    assert loss.item() == pytest.approx(2 + 2.5 - 1.0)


def test_beyond_the_clamp(impl: str) -> None:
    """The mean log-ratio is held at +-20, where nothing pulls but CISPO; each token's is not."""
    logprobs = torch.tensor([[50.0, -30, -1], [-90, 29, -1]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    old, advantages = torch.tensor([[0.0, -30, NAN], [0, 0, NAN]]), -torch.ones(2, 3)
    given = (logprobs, old, advantages)
    given_of = {"mask": mask, "ratio_level": "sequence", "impl": impl, "reduction": "sum"}
    loss, stats = ppo_policy_loss(*given, **given_of)
    torch.testing.assert_close(stats.ratio_max, torch.tensor(20.0).exp())
    torch.testing.assert_close(stats.ratio_mean, torch.tensor([20.0, -20]).exp().mean())
    assert not torch.autograd.grad(loss, logprobs)[0].any()
    loss, _ = ppo_policy_loss(*given, **given_of, objective="cispo", clip_range=(1.0, 0.5))
    slopes = torch.autograd.grad(loss, logprobs)[0]
    expected = torch.tensor([[1.5, 1.5, 0], [math.exp(-20), math.exp(-20), 0]])
    torch.testing.assert_close(slopes, expected)


def test_first_minibatch(impl: str, of: dict[str, str]) -> None:
    """Every ratio is exactly 1, nothing is clipped, and the gradient is exactly -A."""
    logprobs = (-10 * torch.rand(9, 33)).requires_grad_()
    advantages = torch.randn(9, 33)
    loss, stats = ppo_policy_loss(
        logprobs, logprobs.detach(), advantages, **of, clip_range=0.0, reduction="sum", impl=impl
    )
    assert torch.equal(torch.autograd.grad(loss, logprobs)[0], -advantages)
    assert [x.item() for x in stats] == [0, 0, 1, 1, 0, 0]


def test_nan_in_a_real_token_shows(impl: str, of: dict[str, str]) -> None:
    given = arguments(of, (2, 21), impl=impl)
    for name in ("logprobs", "old_logprobs", "advantages"):
        bad = given[name].clone()
        bad[1, 3] = NAN
        loss, stats = ppo_policy_loss(**given | {name: bad})
        assert loss.isnan() and (name == "advantages" or stats.ratio_max.isnan()), name


# --- Against float64 ------------------------------------------------------------------------------


@REDUCTIONS
@pytest.mark.parametrize("kind", ops.MASKS)
def test_error_rule(kernel: str, of: dict[str, str], reduction: str, kind: str) -> None:
    interpreted = [(0, 2), (3, 2), (5, 31), (4, 1025)]  # slowly: fewer
    for shape in interpreted if kernel == "triton" else ops.shapes():
        given = arguments(of, shape, ops.make_mask(kind, shape), reduction=reduction)
        ops.assert_error_rule(
            ppo_policy_loss, reference.ppo_policy_loss, given, WRT, impl=kernel
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_error_rule_in_other_dtypes(kernel: str, of: dict[str, str], dtype: torch.dtype) -> None:
    mask = ops.make_mask("interior", (7, 129))
    given = ops.in_dtype(arguments(of, (7, 129), mask), dtype)
    ops.assert_error_rule(ppo_policy_loss, reference.ppo_policy_loss, given, WRT, impl=kernel)


@REDUCTIONS
def test_strides_do_not_matter(impl: str, of: dict[str, str], reduction: str) -> None:
    mask = ops.make_mask("interior", (5, 37))
    assert mask is not None
    given = arguments(of, (5, 37), mask, reduction=reduction, impl=impl)
    expected = ops.run(ppo_policy_loss, given, WRT)
    others = [("mask", mask.t().contiguous().t())]
    for name in ("logprobs", "old_logprobs", "advantages"):
        others += [(name, x) for _, x in ops.views(given[name])]
    for name, x in others:
        found = ops.run(ppo_policy_loss, given | {name: x}, WRT)
        torch.testing.assert_close(found, expected, msg=lambda m, n=name: f"{n}: {m}")


@NEEDS_CPP
@pytest.mark.parametrize("shape", [(700, 91), (3, 40_000)])
@pytest.mark.parametrize("flat", [False, True], ids=["padded", "packed"])
def test_threads_do_not_change_a_bit(
    of: dict[str, str], shape: tuple[int, int], flat: bool
) -> None:
    given = arguments(of, shape, ops.make_mask("interior", shape), impl="cpp")
    if flat:
        keep = ops.make_mask("right", shape)
        assert keep is not None
        given = packed(given, keep)
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(ops.run(ppo_policy_loss, given, WRT))
    for result in results[1:]:
        ops.assert_same_bits(results[0], result)


# --- From hidden states ---------------------------------------------------------------------------

OF_HEAD = ("hidden", "weight", "bias")


def of_head(given: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The same of the log-probs that a head makes."""
    shape = given["advantages"].shape
    hidden, weight, bias = torch.randn(*shape, 12), torch.randn(71, 12), torch.randn(71)
    targets = torch.randint(0, 71, shape)
    logits = torch.nn.functional.linear(hidden, weight, bias) / 0.7
    logprobs = -cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    others = {
        name: logprobs.view(shape) + given[name] - given["logprobs"]
        for name in ("old_logprobs", "ref_logprobs")
    }
    given = {name: x for name, x in given.items() if name not in WRT} | others
    head = {name: x.to(dtype) for name, x in zip(OF_HEAD, (hidden, weight, bias), strict=True)}
    return given | head | {"targets": targets, "temperature": 0.7}


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("old", [True, False])
def test_error_rule_from_hidden_states(kernel: str, of: dict[str, str], old: bool) -> None:
    forms = itertools.product((torch.float32, torch.bfloat16, torch.float16), ppo_loss.REDUCTIONS)
    interpreted = [(torch.float32, "sequence_mean")]  # slowly: fewer
    for dtype, reduction in interpreted if kernel == "triton" else forms:
        mask = ops.make_mask("interior", (5, 6))
        given = of_head(arguments(of, (5, 6), None, reduction=reduction), dtype) | {"mask": mask}
        for name in ("old_logprobs", "advantages"):
            given[name] = ops.poison(given[name], mask)
        given |= {} if old else {"old_logprobs": None}
        ops.assert_products_rule(
            linear_ppo_loss, reference.linear_ppo_loss, given, OF_HEAD, impl=kernel
        )


@NEEDS_CPP
def test_the_logits_are_made_twice_for_the_ratio_of_a_sequence() -> None:
    """And once where all its ratios are 1."""
    for (objective, level), old in itertools.product(NEW, (True, False)):
        given = of_head(arguments({"objective": objective, "ratio_level": level}))
        given |= {} if old else {"old_logprobs": None}
        for name in OF_HEAD:
            given[name].requires_grad_()
        with ops.Watch() as watch:
            linear_ppo_loss(**given)[0].backward()
        assert watch.products == (4 if old and level == "sequence" else 3)


@pytest.mark.parametrize("level", ppo_loss.RATIO_LEVELS)
def test_cispo_on_policy_is_the_negative_log_likelihood(impl: str, level: str) -> None:
    leaves = [torch.randn(*shape).requires_grad_() for shape in ((5, 9, 12), (71, 12), (71,))]
    hidden, weight, bias = leaves
    targets = torch.randint(0, 71, (5, 9))
    mask = ops.make_mask("interior", (5, 9))
    assert mask is not None
    loss, _ = linear_ppo_loss(
        hidden, weight, targets, None, torch.ones(()).expand(5, 9), bias=bias, mask=mask,
        objective="cispo", ratio_level=level, impl=impl,
    )  # fmt: skip
    expected = cross_entropy((hidden @ weight.T + bias)[mask], targets[mask])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (loss, expected)))


# --- torch.compile, mistakes ----------------------------------------------------------------------


def compiles(function: Callable[..., Any], given: dict[str, Any], wrt: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(ops.run(compiled, given, wrt), ops.run(function, given, wrt))


def test_compiles_without_a_graph_break(impl: str, of: dict[str, str]) -> None:
    given = arguments(of, mask=ops.make_mask("right", (7, 9)))
    compiles(partial(ppo_policy_loss, impl=impl), given, WRT)


@pytest.mark.parametrize("of_op", ops.implementations_of("linear_ppo_loss", but=("triton",)))
def test_linear_compiles_without_a_graph_break(of_op: str, of: dict[str, str]) -> None:
    given = of_head(arguments(of, mask=ops.make_mask("right", (7, 9))))
    compiles(partial(linear_ppo_loss, impl=of_op), given, OF_HEAD)


@pytest.mark.parametrize("op", ["ppo_policy_loss", "linear_ppo_loss"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "cispo", "dual_clip": 3.0},
         "dual_clip bounds the objective 'clip': it must be None with 'cispo', but is 3.0"),
        ({"objective": "gspo"}, "objective must be 'clip' or 'cispo', but is 'gspo'"),
        ({"ratio_level": "batch"}, "ratio_level must be 'token' or 'sequence', but is 'batch'"),
        ({"ratio_level": "sequence", "flat": True}, r"must be \[B, T\], or \[N\] with cu_seqlens"),
        ({"ratio_level": "sequence", "clip_range": (1.1, 0.2)}, "clip_range must be .*<= 1"),
        ({"ratio_level": "sequence", "normalizer": -1.0}, "normalizer must be .*>= 0"),
    ],
    ids=lambda x: "",
)  # fmt: skip
def test_errors(op: str, impl: str, change: dict[str, Any], message: str) -> None:
    given = arguments({"objective": "clip", "ratio_level": "token"}) | {"dual_clip": None}
    given = given if op == "ppo_policy_loss" else of_head(given)
    given |= change
    if given.pop("flat", False):
        given = packed(given, torch.ones(7, 9, dtype=torch.bool)) | {"cu_seqlens": None}
        given |= {"hidden": given["hidden"].flatten(0, 1)} if "hidden" in given else {}
    function = ppo_policy_loss if op == "ppo_policy_loss" else linear_ppo_loss
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        function(**given, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_an_infinite_logprob_is_clamped_in_the_ratio_of_a_sequence(impl: str) -> None:
    logprobs = torch.tensor([[-1.0, -torch.inf, -2.0]], requires_grad=True)
    old, advantages = torch.full((1, 3), -1.5), torch.ones(1, 3)
    loss, _ = ppo_policy_loss(logprobs, old, advantages, ratio_level="sequence", impl=impl)
    loss.backward()
    # The mean log-ratio is -20 in the clamp, with no gradient: the ratio is nearly 0.
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logprobs.grad is not None and not logprobs.grad.isnan().any()

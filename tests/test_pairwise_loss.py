"""`pairwise_loss`: every implementation against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops import assert_error_rule, assert_same_bits, implementations_of, run, views
from torch import Tensor

from ppo_kernels import dispatch, pairwise_loss, ranking_loss, reference
from ppo_kernels.pairwise_loss import _pairwise_op

IMPLS = pytest.mark.parametrize("impl", implementations_of("pairwise_loss"))
NEEDS_CPP = pytest.mark.skipif(dispatch.cpu is None, reason="the C++ extension is not built")
NAN = math.nan
WRT = ("chosen", "rejected")


def arguments(pairs: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    chosen, rejected, margin = 3 * torch.randn(3, pairs, dtype=dtype)
    rejected[::5] = chosen[::5]  # ties
    return {"chosen": chosen, "rejected": rejected, "margin": margin, "center_coef": 0.05}


@IMPLS
def test_by_hand(impl: str) -> None:
    # s+ - s- - margin = (log 3, -log 3, 0): sigmoids 3/4, 1/4, 1/2; the sums are 3, 1 and 2.
    log3 = math.log(3)
    chosen = torch.tensor([2 + log3, 1.0, 2.0], dtype=torch.float64).requires_grad_()
    rejected = torch.tensor([1.0, log3, 1.0], dtype=torch.float64).requires_grad_()
    margin = torch.tensor([1.0, 1.0, 1.0])
    loss, stats = pairwise_loss(chosen, rejected, margin=margin, center_coef=0.5, impl=impl)
    sums = [3 + log3, 1 + log3, 3.0]
    expected = math.log(4 / 3) + math.log(4) + math.log(2) + sum(s * s for s in sums) / 2
    assert loss.item() == pytest.approx(expected / 3)
    a, b = torch.autograd.grad(loss, (chosen, rejected))
    slopes = [1 / 4, 3 / 4, 1 / 2]  # 1 - sigmoid
    assert (3 * a).tolist() == pytest.approx([s - d for s, d in zip(sums, slopes, strict=True)])
    assert (3 * b).tolist() == pytest.approx([s + d for s, d in zip(sums, slopes, strict=True)])
    assert stats.accuracy.item() == pytest.approx(2 / 3)
    assert stats.margin.item() == pytest.approx(3 / 3)
    shared, _ = pairwise_loss(chosen, rejected, margin=1, center_coef=0.5, impl=impl)
    torch.testing.assert_close(shared, loss)


@IMPLS
def test_the_graph_may_be_gone_through_again(impl: str) -> None:
    """Its gradients are made ahead: no pass may find those of the one before changed."""
    chosen, rejected = torch.randn(2, 5).unbind()
    leaves = (chosen.requires_grad_(), rejected.requires_grad_())
    loss, _ = pairwise_loss(*leaves, impl=impl)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)[0].clone()
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert torch.equal(chosen.grad, times * once)
    (returned,) = torch.autograd.grad(loss, [chosen], retain_graph=True)
    returned.mul_(2)
    try:
        (again,) = torch.autograd.grad(loss, [chosen], retain_graph=True)
    except RuntimeError as error:
        assert "inplace operation" in str(error)
    else:
        assert torch.equal(again, once)


@IMPLS
def test_ties_and_defaults(impl: str) -> None:
    chosen = torch.tensor([1.0, 2.0, 3.0, 0.0])
    loss, stats = pairwise_loss(chosen, torch.tensor([1.0, 1.0, 4.0, -2.0]), impl=impl)
    assert stats.accuracy == (0.5 + 1 + 0 + 1) / 4
    assert stats.margin == (0 + 1 - 1 + 2) / 4
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in (0, 1, -1, 2)) / 4)


@pytest.mark.parametrize("kernel", implementations_of("pairwise_loss", but=("reference",)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_error_rule(kernel: str, dtype: torch.dtype) -> None:
    for pairs in (0, 1, 2, 7, 31, 64, 129, 1025, 20_011):
        given = arguments(pairs, dtype)
        for margin in (given["margin"], None, 0.7):
            given = given | {"margin": margin}
            assert_error_rule(pairwise_loss, reference.pairwise_loss, given, WRT, impl=kernel)


@IMPLS
def test_extreme_scores(impl: str) -> None:
    """No overflow, and a gradient of exactly 0 or 1 where the sigmoid is."""
    difference = torch.tensor([-1e30, -200.0, 200.0, 1e30], requires_grad=True)
    loss, _ = pairwise_loss(difference, torch.zeros(4), impl=impl)
    assert loss.item() == pytest.approx((1e30 + 200) / 4)
    gradient = torch.autograd.grad(loss, difference)[0]
    assert (4 * gradient).tolist() == pytest.approx([-1, -1, 0, 0], abs=1e-30)


@IMPLS
def test_nan_shows(impl: str) -> None:
    for name in ("chosen", "rejected", "margin"):
        given = arguments(9) | {"impl": impl}
        given[name][4] = math.nan
        assert pairwise_loss(**given)[0].isnan()


@IMPLS
def test_strides_do_not_matter(impl: str) -> None:
    given = arguments(37) | {"impl": impl}
    expected = run(pairwise_loss, given, WRT)
    for name in ("chosen", "rejected", "margin"):
        for _, x in views(given[name]):
            assert_same_bits(expected, run(pairwise_loss, given | {name: x}, WRT))
    one = torch.tensor([0.5]).expand(37)
    expected = run(pairwise_loss, given | {"chosen": one.clone()}, WRT)
    assert_same_bits(expected, run(pairwise_loss, given | {"chosen": one}, WRT))


@IMPLS
def test_no_pairs(impl: str) -> None:
    for name, x in run(pairwise_loss, arguments(0) | {"impl": impl}, WRT).items():
        assert not x.any(), name  # NaN would be true


@IMPLS
def test_gradient_of_one_side_only(impl: str) -> None:
    given = arguments(5, torch.bfloat16)
    given["chosen"] = given["chosen"].float()
    both = run(pairwise_loss, given | {"impl": impl}, WRT)
    for name in WRT:
        one = run(pairwise_loss, given | {"impl": impl}, (name,))
        assert one[f"gradient of {name}"].dtype == given[name].dtype
        torch.testing.assert_close(one[f"gradient of {name}"], both[f"gradient of {name}"])


@NEEDS_CPP
def test_threads_do_not_change_a_bit() -> None:
    given = arguments(50_000) | {"impl": "cpp"}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(pairwise_loss, given, WRT))
    for result in results[1:]:
        assert_same_bits(results[0], result)


@NEEDS_CPP
def test_opcheck() -> None:
    given = arguments(5)
    numbers = torch.tensor([0.0, 0.1], dtype=torch.float64)
    scores = (given["chosen"].requires_grad_(), given["rejected"].requires_grad_())
    torch.library.opcheck(_pairwise_op, (*scores, given["margin"], numbers, "cpp", True, True))


@NEEDS_CPP
def test_compile_without_breaks_or_recompiles() -> None:
    given = arguments(7)
    chosen = given["chosen"].requires_grad_()

    def loss(margin: float, coef: float) -> tuple[Tensor, ...]:
        value, stats = pairwise_loss(chosen, given["rejected"], margin=margin, center_coef=coef)
        return value, *stats

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for i in range(4):
        numbers = (0.5 * i + 0.5, 0.1 * i + 0.1)
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            got = compiled(*numbers)
        expected = loss(*numbers)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got[0], chosen), torch.autograd.grad(expected[0], chosen)
        )


# --- Rankings -------------------------------------------------------------------------------------

OF_RANKINGS = pytest.mark.parametrize("impl", implementations_of("ranking_loss"))


def ranking(prompts: int, candidates: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """With ties in ranks and in scores, absent responses (of score NaN), prompts without a pair."""
    ranks = torch.randint(-1, 4, (prompts, candidates))
    ranks[::5] = 2
    scores = 2 * torch.randn(prompts, candidates)
    scores[:, 1::3] = scores[:, :1]
    return {"scores": scores.to(dtype).masked_fill(ranks < 0, NAN), "ranks": ranks}


@OF_RANKINGS
def test_rankings_are_all_their_pairs(impl: str) -> None:
    scores, ranks = torch.randn(4, 5, dtype=torch.float64), torch.randint(-1, 3, (4, 5))
    ranks[2] = 1  # no pair: does not count
    losses, differences = [], []
    for s, r in zip(scores.tolist(), ranks.tolist(), strict=True):
        of = [a - b for a, i in zip(s, r, strict=True) for b, j in zip(s, r, strict=True)
              if 0 <= i < j]  # fmt: skip
        if of:
            losses.append(sum(math.log1p(math.exp(-d)) for d in of) / len(of))
        differences += of
    loss, stats = ranking_loss(scores, ranks, impl=impl)
    assert loss.item() == pytest.approx(sum(losses) / len(losses))
    assert stats.accuracy.item() == pytest.approx(
        sum(d > 0 for d in differences) / len(differences)
    )
    assert stats.margin.item() == pytest.approx(sum(differences) / len(differences))


@OF_RANKINGS
def test_two_responses_are_a_pair(impl: str) -> None:
    chosen, rejected = torch.randn(2, 6)
    scores, ranks = torch.stack((rejected, chosen), 1), torch.tensor([[1, 0]]).expand(6, 2)
    torch.testing.assert_close(
        ranking_loss(scores, ranks, impl=impl), pairwise_loss(chosen, rejected, impl="reference")
    )


@pytest.mark.parametrize("kernel", implementations_of("ranking_loss", but=("reference",)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_error_rule_of_rankings(kernel: str, dtype: torch.dtype) -> None:
    for shape in ((0, 3), (1, 0), (1, 1), (2, 2), (7, 5)):
        given = ranking(*shape, dtype)
        assert_error_rule(ranking_loss, reference.ranking_loss, given, ("scores",), impl=kernel)
    for _, view in views(given["scores"]):
        strided = given | {"scores": view}
        assert_error_rule(ranking_loss, reference.ranking_loss, strided, ("scores",), impl=kernel)


@OF_RANKINGS
def test_errors_of_rankings(impl: str) -> None:
    scores, ranks = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ranking_loss: scores must be \[P, K\]"):
        ranking_loss(scores[0], ranks[0], impl=impl)
    with pytest.raises(ValueError, match="ranking_loss: ranks must have shape"):
        ranking_loss(scores, ranks[:1], impl=impl)
    with pytest.raises(TypeError, match="ranking_loss: ranks must be int32 or int64"):
        ranking_loss(scores, ranks.float(), impl=impl)


@OF_RANKINGS
def test_rankings_compile_without_a_break(impl: str) -> None:
    given = ranking(5, 4) | {"impl": impl}
    torch._dynamo.reset()
    compiled = torch.compile(ranking_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        run(compiled, given, ("scores",)), run(ranking_loss, given, ("scores",))
    )

"""`pairwise_loss`: every implementation against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops import (
    Watch,
    assert_error_rule,
    assert_same_bits,
    implementations_of,
    run,
    upstream_of,
    views,
)
from torch import Tensor

from ppo_kernels import dispatch, pairwise_loss, ranking_loss, reference
from ppo_kernels.pairwise_loss import _pairwise_op, _ranking_op

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
    rejected[2] = chosen[2]
    scores, ranks = torch.stack((rejected, chosen), 1), torch.tensor([[1, 0]]).expand(6, 2)
    torch.testing.assert_close(
        ranking_loss(scores, ranks, impl=impl), pairwise_loss(chosen, rejected, impl="reference")
    )


FEW = ((0, 3), (1, 0), (1, 1), (2, 2), (7, 5))
# Around the numbers of responses up to which prompts lie side by side, and of a tile.
MANY = ((300, 4), (9, 32), (5, 33), (3, 64), (2, 65), (2, 255), (1, 257), (1, 601))


@pytest.mark.parametrize("kernel", implementations_of("ranking_loss", but=("reference",)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_error_rule_of_rankings(kernel: str, dtype: torch.dtype) -> None:
    for shape in FEW + (MANY if kernel == "cpp" else ()):  # Triton's interpreter takes its time
        given = ranking(*shape, dtype)
        assert_error_rule(ranking_loss, reference.ranking_loss, given, ("scores",), impl=kernel)
        wide = given | {"scores": 30 * given["scores"]}  # sigmoids of 0 and 1
        assert_error_rule(ranking_loss, reference.ranking_loss, wide, ("scores",), impl=kernel)


@pytest.mark.parametrize("impl", implementations_of("ranking_loss", but=("reference",)))
@pytest.mark.parametrize("shape", [(6, 5), (2, 35)])
def test_strides_and_dtypes_of_ranks_do_not_matter(impl: str, shape: tuple[int, int]) -> None:
    given = ranking(*shape) | {"impl": impl}
    expected = run(ranking_loss, given, ("scores",))
    for _, scores in views(given["scores"]):
        assert_same_bits(expected, run(ranking_loss, given | {"scores": scores}, ("scores",)))
    for dtype in (torch.int32, torch.int64):
        ranks = given["ranks"].to(dtype)
        apart = torch.stack((ranks, ranks + 1), -1)[..., 0]
        for view in (ranks, apart, ranks.t().contiguous().t()):
            assert_same_bits(expected, run(ranking_loss, given | {"ranks": view}, ("scores",)))
    one = given | {"ranks": given["ranks"][:1].expand(shape), "scores": torch.randn(shape)}
    copy = one | {"ranks": one["ranks"].clone()}
    assert_same_bits(run(ranking_loss, one, ("scores",)), run(ranking_loss, copy, ("scores",)))


@OF_RANKINGS
@pytest.mark.parametrize("shape", [(6, 5), (2, 35)])
def test_only_the_order_of_ranks_matters(impl: str, shape: tuple[int, int]) -> None:
    given = ranking(*shape) | {"impl": impl}
    expected = run(ranking_loss, given, ("scores",))
    for far in (
        given["ranks"] * 2**61,  # apart by more than 32 bits hold
        torch.where(given["ranks"] < 0, -(2**40), given["ranks"] + 2**40),
        torch.where(given["ranks"] < 0, -(2**31), given["ranks"] + 2**31 - 2),
    ):
        assert_same_bits(expected, run(ranking_loss, given | {"ranks": far}, ("scores",)))


@OF_RANKINGS
@pytest.mark.parametrize("responses", [4, 40])
def test_absent_responses_change_nothing(impl: str, responses: int) -> None:
    """Whatever their scores, they add nothing and get a gradient of 0, as do prompts without a
    pair, which do not count."""
    scores, ranks = torch.randn(5, responses), torch.randint(0, 3, (5, responses))
    ranks[:, :2] = torch.tensor([0, 1])  # each prompt has a pair
    expected = run(ranking_loss, {"scores": scores, "ranks": ranks, "impl": impl}, ("scores",))
    for garbage in (NAN, math.inf, -math.inf, 1e30):
        more = torch.full((8, responses + 3), garbage)
        more_ranks = torch.full((8, responses + 3), -1)
        more[1:6, 1:-2], more_ranks[1:6, 1:-2] = scores, ranks
        more[6, 2], more_ranks[6, 2] = 1.0, 0  # alone
        more[7], more_ranks[7] = 1.0, 5  # all equal
        given = {"scores": more, "ranks": more_ranks, "impl": impl}
        found = run(ranking_loss, given, ("scores",))
        gradient = found.pop("gradient of scores")
        torch.testing.assert_close(gradient[1:6, 1:-2], expected["gradient of scores"])
        gradient[1:6, 1:-2] = 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
        torch.testing.assert_close(found, {name: expected[name] for name in found})


@OF_RANKINGS
@pytest.mark.parametrize("responses", [3, 36])
def test_extreme_scores_of_rankings(impl: str, responses: int) -> None:
    """No overflow, and slopes of exactly 0 or 1 where the sigmoid is."""
    scores = torch.zeros(2, responses)
    ranks = torch.full((2, responses), -1)
    scores[:, -3:] = torch.tensor([[1e30, -1e30, 0], [0, 0, 0]])
    ranks[:, -3:] = torch.tensor([[1, 0, -1], [0, 1, 2]])
    scores.requires_grad_()
    loss, stats = ranking_loss(scores, ranks, impl=impl)
    assert loss.item() == pytest.approx((2e30 + math.log(2)) / 2)
    gradient = torch.autograd.grad(loss, scores)[0][:, -3:]
    expected = [[1 / 2, -1 / 2, 0], [-1 / 6, 0, 1 / 6]]
    torch.testing.assert_close(gradient, torch.tensor(expected))
    assert stats.accuracy.item() == pytest.approx(1.5 / 4)
    apart = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss, _ = ranking_loss(apart, torch.tensor([[0, 1]]), impl=impl)
    assert loss == 0 and not torch.autograd.grad(loss, apart)[0].any()


@OF_RANKINGS
@pytest.mark.parametrize("responses", [5, 50])
def test_nan_of_a_ranked_response_shows(impl: str, responses: int) -> None:
    scores, ranks = torch.randn(3, responses), torch.arange(responses).expand(3, -1)
    scores[1, -1] = NAN
    loss, stats = ranking_loss(scores, ranks, impl=impl)
    assert loss.isnan() and stats.margin.isnan()


@NEEDS_CPP
@pytest.mark.parametrize(("prompts", "responses"), [(20_011, 4), (70, 300)])
def test_threads_do_not_change_a_bit_of_rankings(prompts: int, responses: int) -> None:
    given = ranking(prompts, responses) | {"impl": "cpp"}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(ranking_loss, given, ("scores",)))
    for result in results[1:]:
        assert_same_bits(results[0], result)


@NEEDS_CPP
def test_rankings_hold_no_pairs() -> None:
    """The memory of 10^8 pairs is never asked for, and their sums stay those of float64."""
    responses = 10_000
    scores, ranks = torch.randn(1, responses), torch.randperm(responses)[None]
    with Watch() as watch:
        found = run(ranking_loss, {"scores": scores, "ranks": ranks, "impl": "cpp"}, ("scores",))
    assert watch.largest == responses
    few = slice(0, 100)  # against all others
    ahead = ranks[0, few, None] < ranks
    difference = (scores[0, few, None] - scores).double()
    slope = torch.where(ahead, torch.sigmoid(-difference), -torch.sigmoid(difference))
    slope[range(100), range(100)] = 0
    expected = -upstream_of("output.0", torch.zeros(())) * slope.sum(1)
    expected /= responses * (responses - 1) / 2
    torch.testing.assert_close(
        found["gradient of scores"][0, few].double(), expected.double(), rtol=1e-5, atol=1e-9
    )


@NEEDS_CPP
def test_opcheck_of_rankings() -> None:
    given = ranking(5, 4)
    scores = given["scores"].nan_to_num(0.0).requires_grad_()
    torch.library.opcheck(_ranking_op, (scores, given["ranks"], "cpp", True))


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

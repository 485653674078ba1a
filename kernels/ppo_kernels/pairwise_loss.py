"""The preference losses that train reward models: of pairs, and of rankings."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, fused_loss, reference
from ppo_kernels.fused_loss import gradient_like
from ppo_kernels.reference import PairwiseStats

OP, RANKING = "pairwise_loss", "ranking_loss"


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, PairwiseStats]:
    """Bradley-Terry loss of score pairs (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    mean of -log sigmoid(s+ - s- - margin) + center_coef (s+ + s-)^2. Differentiable, once, in both
    scores.

    Args:
        chosen, rejected: `[P]` scores, any floating dtypes and strides.
        margin: number or `[P]`, by how much the chosen score should be ahead (Touvron et al. 2023,
            arXiv:2307.09288, eq. 2); default 0.
        center_coef: pulls the scores' sums to 0, which the first term leaves free (Eisenstein et
            al. 2023, arXiv:2312.09244).
        impl: "auto", or one of `implementations()["pairwise_loss"]`.

    Returns:
        (loss, statistics): 0-dim, float32 (float64 where an input is), the statistics without
        gradient; all 0 without any pair.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    checks.tensor(OP, "chosen", chosen)
    if chosen.ndim != 1:
        raise ValueError(f"{OP}: chosen must have shape [P], but has {tuple(chosen.shape)}")
    shape, like = tuple(chosen.shape), ("chosen", chosen)
    checks.tensor(OP, "rejected", rejected, shape=shape, like=like)
    margins = margin if isinstance(margin, Tensor) else None
    if margins is not None:
        checks.tensor(OP, "margin", margins, shape=shape, like=like)
    impl = dispatch.resolve(OP, impl, chosen.device)
    if impl == "reference":
        if not torch.compiler.is_compiling():
            _numbers(margin, center_coef)
        return reference.pairwise_loss(chosen, rejected, margin=margin, center_coef=center_coef)

    tensors = (chosen, rejected, margins)
    wanted = fused_loss.wanted(chosen, rejected)
    if not dispatch.eager(*tensors):
        shared = 0.0 if margin is None or margins is not None else margin
        traced = torch.stack((dispatch.traced(shared), dispatch.traced(center_coef)))
        loss, stats, *_ = _pairwise_op(*tensors, traced, impl, *wanted)
        stats = stats.detach()
    else:
        results = _pairwise_loss(*tensors, _numbers(margin, center_coef), impl, *wanted)
        loss, stats = fused_loss.attach(results, (chosen, rejected), wanted), results[1]
    return loss, PairwiseStats(*stats.unbind())


def ranking_loss(
    scores: Tensor, ranks: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, PairwiseStats]:
    """Bradley-Terry loss of rankings, all ordered pairs of a prompt (Ouyang et al. 2022, eq. 1).

    The mean over the prompts of each one's mean over its pairs of -log sigmoid(s_better - s_worse):
    a prompt weighs the same however many pairs it has, and nothing where it has none.
    Differentiable, once, in the scores.

    Args:
        scores: `[P, K]`, any floating dtype and strides: K responses to each of P prompts.
        ranks: `[P, K]` int32 or int64, lower is better; equal ranks are no pair; below 0 is absent,
            its score is not read.
        impl: "auto", or one of `implementations()["ranking_loss"]`.

    Returns:
        (loss, statistics): as `pairwise_loss`; the statistics are over all pairs alike.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    checks.tensor(RANKING, "scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"{RANKING}: scores must be [P, K], but has shape {tuple(scores.shape)}")
    checks.tensor(
        RANKING, "ranks", ranks, checks.INDEX_DTYPES, shape=tuple(scores.shape),
        like=("scores", scores),
    )  # fmt: skip
    impl = dispatch.resolve(RANKING, impl, scores.device)
    if impl == "reference":
        return reference.ranking_loss(scores, ranks)
    wanted = fused_loss.wanted(scores)
    if not dispatch.eager(scores, ranks):
        loss, stats, _ = _ranking_op(scores, ranks, impl, *wanted)
        stats = stats.detach()
    else:
        results = _ranking_loss(scores, ranks, impl, *wanted)
        loss, stats = fused_loss.attach(results, (scores,), wanted), results[1]
    return loss, PairwiseStats(*stats.unbind())


def _numbers(margin: float | Tensor | None, center_coef: float) -> tuple[float, float]:
    """(margin that all pairs share, center_coef), checked."""
    shared = margin is not None and not isinstance(margin, Tensor)
    return (
        checks.number(OP, "margin", margin) if shared else 0.0,
        checks.number(OP, "center_coef", center_coef),
    )


# --- C++ on the CPU: csrc/cpu/pairwise_loss.cpp; Triton on a GPU: triton/pairwise_loss.py ---------


def _pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None,
    numbers: tuple[float, float],
    impl: str,
    want_chosen: bool,
    want_rejected: bool,
) -> fused_loss.Results:
    """(loss, statistics, gradient of chosen, of rejected)."""
    dtype, inputs = dispatch.in_one_dtype(chosen, rejected, margins)
    loss = chosen.new_empty((), dtype=dispatch.accumulator(dtype))
    stats = loss.new_empty(len(PairwiseStats._fields))
    grad_chosen = gradient_like(chosen, loss, want_chosen)
    grad_rejected = gradient_like(chosen, loss, want_rejected)
    arguments = (*inputs, *numbers, loss, stats, grad_chosen, grad_rejected)
    if impl == "triton":
        dispatch.triton_kernels("pairwise_loss").pairwise_loss(*arguments)
    else:
        dispatch.cpu.pairwise_loss(*arguments, torch.get_num_threads())
    return loss, stats, grad_chosen, grad_rejected


def _ranking_loss(
    scores: Tensor, ranks: Tensor, impl: str, want_scores: bool
) -> fused_loss.Results:
    """(loss, statistics, gradient of the scores)."""
    loss = scores.new_empty((), dtype=dispatch.accumulator(scores.dtype))
    stats = loss.new_empty(len(PairwiseStats._fields))
    grad_scores = gradient_like(scores, loss, want_scores)
    arguments = scores, ranks, loss, stats, grad_scores
    if impl == "triton":
        dispatch.triton_kernels("pairwise_loss").ranking_loss(*arguments)
    else:
        dispatch.cpu.ranking_loss(*arguments, torch.get_num_threads())
    return loss, stats, grad_scores


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op(
    "ppo_kernels::pairwise_loss", mutates_args=(), device_types=dispatch.DEVICES
)
def _pairwise_op(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None,
    numbers: Tensor,
    impl: str,
    want_chosen: bool,
    want_rejected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checked = _numbers(*numbers.tolist())
    results = _pairwise_loss(chosen, rejected, margins, checked, impl, want_chosen, want_rejected)
    return fused_loss.without_none(results)


@_pairwise_op.register_fake
def _(chosen, rejected, margins, numbers, impl, *wanted):  # type: ignore[no-untyped-def]
    dtype = dispatch.accumulator(dispatch.common_dtype(chosen, rejected, margins))
    loss = chosen.new_empty((), dtype=dtype)
    stats = loss.new_empty(len(PairwiseStats._fields))
    gradients = (gradient_like(chosen, loss, want) for want in wanted)
    return fused_loss.without_none((loss, stats, *gradients))


@torch.library.custom_op(
    "ppo_kernels::ranking_loss", mutates_args=(), device_types=dispatch.DEVICES
)
def _ranking_op(
    scores: Tensor, ranks: Tensor, impl: str, want_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return fused_loss.without_none(_ranking_loss(scores, ranks, impl, want_scores))


@_ranking_op.register_fake
def _(scores, ranks, impl, want_scores):  # type: ignore[no-untyped-def]
    loss = scores.new_empty((), dtype=dispatch.accumulator(scores.dtype))
    stats = loss.new_empty(len(PairwiseStats._fields))
    return fused_loss.without_none((loss, stats, gradient_like(scores, loss, want_scores)))


fused_loss.register(_pairwise_op, trained=2)
fused_loss.register(_ranking_op, trained=1)

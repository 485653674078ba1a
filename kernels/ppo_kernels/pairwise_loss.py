"""The pairwise preference loss that trains reward models."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, fused_loss, reference
from ppo_kernels.fused_loss import gradient_like
from ppo_kernels.reference import PairwiseStats

OP = "pairwise_loss"


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


fused_loss.register(_pairwise_op, trained=2)

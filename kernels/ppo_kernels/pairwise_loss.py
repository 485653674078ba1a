"""The pairwise preference loss that trains reward models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_kernels import checks, dispatch, reference
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
    if dispatch.resolve(OP, impl, chosen.device) == "reference":
        if not torch.compiler.is_compiling():
            _numbers(margin, center_coef)
        return reference.pairwise_loss(chosen, rejected, margin=margin, center_coef=center_coef)

    tensors = (chosen, rejected, margins)
    want = torch.is_grad_enabled() and (chosen.requires_grad or rejected.requires_grad)
    if not dispatch.eager(*tensors):
        same = 0.0 if margin is None or margins is not None else margin
        traced = torch.stack((dispatch.traced(same), dispatch.traced(center_coef)))
        loss, stats, *_ = _op(*tensors, traced, want)
    elif want:
        loss, stats = _PairwiseLoss.apply(*tensors, _numbers(margin, center_coef), True)
    else:
        loss, stats, *_ = _pairwise_loss(*tensors, _numbers(margin, center_coef), False)
    return loss, PairwiseStats(*stats.detach().unbind())


def _numbers(margin: float | Tensor | None, center_coef: float) -> tuple[float, float]:
    """(margin that all pairs share, center_coef), checked."""
    shared = margin is not None and not isinstance(margin, Tensor)
    return (
        checks.number(OP, "margin", margin) if shared else 0.0,
        checks.number(OP, "center_coef", center_coef),
    )


# --- C++ on the CPU: csrc/cpu/pairwise_loss.cpp ---------------------------------------------------


def _pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None,
    numbers: tuple[float, float],
    want_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, gradient of chosen, of rejected); gradients not wanted are empty."""
    dtype = dispatch.common_dtype(chosen, rejected, margins)
    # A list, which holds the tensors until the call returns.
    cast = [dispatch.cast(x, dtype) for x in (chosen, rejected, margins)]
    loss = chosen.new_empty((), dtype=dispatch.accumulator(dtype))
    stats = loss.new_empty(len(PairwiseStats._fields))
    grad_chosen = loss.new_empty(chosen.shape if want_gradients else (0,))
    grad_rejected = torch.empty_like(grad_chosen)
    dispatch.cpu.pairwise_loss(
        dispatch.dtype_code(dtype), chosen.shape[0], *(dispatch.tokens(x) for x in cast), *numbers,
        loss.data_ptr(), stats.data_ptr(),
        dispatch.tokens(grad_chosen if want_gradients else None),
        dispatch.tokens(grad_rejected if want_gradients else None), torch.get_num_threads(),
    )  # fmt: skip
    return loss, stats, grad_chosen, grad_rejected


def _chain(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None or not ctx.want_gradients:
        return None, None, None, None, None
    gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *((x * grad_loss).to(dtype) for x, dtype in gradients), None, None, None


class _PairwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = _pairwise_loss(*inputs)
        _save(ctx, inputs, outputs)
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        return outputs[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _chain(ctx, grad_loss)


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op("ppo_kernels::pairwise_loss", mutates_args=(), device_types="cpu")
def _op(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None,
    numbers: Tensor,
    want_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checked = _numbers(*numbers.tolist())
    return _pairwise_loss(chosen, rejected, margins, checked, want_gradients)


@_op.register_fake
def _(chosen, rejected, margins, numbers, want_gradients):  # type: ignore[no-untyped-def]
    dtype = dispatch.accumulator(dispatch.common_dtype(chosen, rejected, margins))
    loss = chosen.new_empty((), dtype=dtype)
    gradients = (loss.new_empty(chosen.shape if want_gradients else (0,)) for _ in range(2))
    return loss, loss.new_empty(len(PairwiseStats._fields)), *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [x.dtype for x in inputs[:2]]
    ctx.want_gradients = inputs[-1]


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _chain(ctx, grad_loss)


_op.register_autograd(_backward, setup_context=_save)

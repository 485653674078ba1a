"""Root mean square norm, with a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference
from ppo_kernels.once import once_differentiable

OP = "rms_norm"


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    added: float = 0.0,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """x / sqrt(mean x^2 + eps) (weight + added), over the last dimension.

    Differentiable, once, in x and the weight; of a forward pass only these two are kept.

    Args:
        x: `[..., D]`, any floating dtype. Read in place if the last dimension is contiguous,
            whatever the strides of the others; copied if not.
        weight: `[D]`, any floating dtype.
        eps: 0 or more.
        added: 1 for the norms of Gemma, which keep what their weight is beyond 1.
        dtype: of the result, by default that of x; a product in bfloat16 that follows a float32 x
            then needs no cast of its own.
        impl: "auto", or one of `implementations()["rms_norm"]`.

    Returns:
        `[..., D]`, contiguous, computed in float32 (float64 where x or the weight is) and rounded
        once. The weight's gradient is summed in that dtype or better, in a fixed order.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    checks.tensor(OP, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must be [..., D], but has no dimension")
    checks.tensor(OP, "weight", weight, shape=(x.shape[-1],), like=("x", x))
    if dtype is None:
        dtype = x.dtype
    elif dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"{OP}: dtype must be a floating-point torch.dtype, but is {dtype!r}")
    impl = dispatch.resolve(OP, impl, x.device)
    if impl == "reference":
        _check_numbers(eps, added)
        return reference.rms_norm(x, weight, eps=eps, added=added, dtype=dtype)
    if not dispatch.eager(x, weight):
        normed: Tensor = _forward_op(x, weight, eps, added, dtype, impl)
        return normed
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        normed = _RMSNorm.apply(x, weight, eps, added, dtype, impl)
        return normed
    return _forward(x, weight, eps, added, dtype, impl)


def _check_numbers(eps: float, added: float) -> None:
    checks.number(OP, "eps", eps, ge=0.0)
    checks.number(OP, "added", added)


# --- C++ on the CPU: csrc/cpu/rms_norm.cpp; Triton on a GPU: triton/rms_norm.py -------------------


def _forward(
    x: Tensor, weight: Tensor, eps: float, added: float, dtype: torch.dtype, impl: str
) -> Tensor:
    _check_numbers(eps, added)
    computed = dispatch.accumulator(dispatch.common_dtype(x, weight))
    x, weight = _as_read(x, computed), weight.contiguous()
    y = dispatch.empty_like(x, _beside(dtype, computed))
    if impl == "triton":
        dispatch.triton_kernels(OP).rms_norm(x, weight, eps, added, y)
    else:
        dispatch.cpu.rms_norm(x, weight, eps, added, y, torch.get_num_threads())
    return y if y.dtype is dtype else y.to(dtype)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    added: float,
    impl: str,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight, None where not wanted; one of them is."""
    computed = dispatch.accumulator(dispatch.common_dtype(x, weight))
    dtype, x, weight = x.dtype, _as_read(x, computed), weight.contiguous()
    grad_y = dispatch.side_by_side(grad_y.to(_beside(grad_y.dtype, computed)))
    grad_x = dispatch.empty_like(x, x.dtype) if want_x else None
    grad_weight = torch.empty_like(weight) if want_weight else None
    arguments = grad_y, x, weight, eps, added, grad_x, grad_weight
    if impl == "triton":
        dispatch.triton_kernels(OP).rms_norm_backward(*arguments)
    else:
        dispatch.cpu.rms_norm_backward(*arguments, torch.get_num_threads())
    return None if grad_x is None else grad_x.to(dtype), grad_weight


def _as_read(x: Tensor, computed: torch.dtype) -> Tensor:
    """`x` as the kernels take it: float64 where that is computed in."""
    return dispatch.side_by_side(x.to(computed) if computed is torch.float64 else x)


def _beside(dtype: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """`dtype` where a kernel that computes in `computed` reads or writes it, else that one."""
    return dtype if dispatch.accumulator(dtype) is computed else computed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, added: float, dtype: torch.dtype, impl: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = eps, added, impl
        return _forward(x, weight, eps, added, dtype, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        gradients = _backward(grad_y, *ctx.saved_tensors, *ctx.settings, *wanted)
        return *gradients, None, None, None, None


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op("ppo_kernels::rms_norm", mutates_args=(), device_types=dispatch.DEVICES)
def _forward_op(
    x: Tensor, weight: Tensor, eps: float, added: float, dtype: torch.dtype, impl: str
) -> Tensor:
    return _forward(x, weight, eps, added, dtype, impl)


@_forward_op.register_fake
def _(x, weight, eps, added, dtype, impl):  # type: ignore[no-untyped-def]
    return dispatch.empty_like(x, dtype)


@torch.library.custom_op(
    "ppo_kernels::rms_norm_backward", mutates_args=(), device_types=dispatch.DEVICES
)
def _backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    added: float,
    impl: str,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    found = _backward(grad_y, x, weight, eps, added, impl, want_x, want_weight)
    grad_x, grad_weight = (x.new_empty(0) if g is None else g for g in found)
    return grad_x, grad_weight


@_backward_op.register_fake
def _(grad_y, x, weight, eps, added, impl, want_x, want_weight):  # type: ignore[no-untyped-def]
    return (
        dispatch.empty_like(x, x.dtype) if want_x else x.new_empty(0),
        dispatch.empty_like(weight, weight.dtype) if want_weight else x.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, eps, added, _, impl = inputs
    ctx.save_for_backward(x, weight)
    ctx.settings = eps, added, impl


def _backward_of_op(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    found = _backward_op(grad_y, *ctx.saved_tensors, *ctx.settings, *wanted)
    gradients = (g if want else None for g, want in zip(found, wanted, strict=True))
    return *gradients, None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_save)

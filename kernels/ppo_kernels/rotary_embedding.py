"""Rotary position embedding of query and key, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference

OP = "rotary_embedding"


def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Query and key, rotated by their positions (RoFormer, Su et al. 2021, arXiv:2104.09864).

    out_i = x_i cos_i - x_{i+R/2} sin_i and out_{i+R/2} = x_{i+R/2} cos_{i+R/2} + x_i sin_{i+R/2}
    for i < R/2, the order of GPT-NeoX and Llama; what is beyond R is copied. Differentiable in
    query and key any number of times; cos and sin, which are constants, are all that is kept.

    Args:
        query, key: `[B, Hq, T, D]` and `[B, Hkv, T, D]` of one floating dtype. Read in place if the
            last dimension is contiguous, whatever the other strides; copied if not.
        cos, sin: `[B, T, R]`, or `[1, T, R]` for all rows; any floating dtype; R even, 0 to D.
        impl: "auto", or one of `implementations()["rotary_embedding"]`.

    Returns:
        (query, key), in their dtype and shapes, over memory ordered `[B, T, H, D]`. Computed in
        float32 (float64 where any input is).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    _check(query, key, cos, sin)
    impl = dispatch.resolve(OP, impl, query.device)
    if impl == "reference":
        return reference.rotary_embedding(query, key, cos, sin)
    if not dispatch.eager(query, key, cos, sin):
        return _rotation_op(query, key, cos, sin, False, impl)
    return _rotated(query, key, cos, sin, False, impl)


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Types, shapes and devices."""
    # A fast check that all is right, as `checks.tokens` has it; the rest finds what is wrong.
    looks = dispatch.cpu is not None and not torch.compiler.is_compiling()
    if looks and dispatch.cpu.rotary_fits(query, key, cos, sin):
        return
    like = ("query", query)
    checks.tensor(OP, "query", query)
    checks.tensor(OP, "key", key, (query.dtype,), like=like)
    checks.tensor(OP, "cos", cos, like=like)
    checks.tensor(OP, "sin", sin, like=like)
    of_query, of_key, of_cos = query.shape, key.shape, cos.shape
    if (
        len(of_query) != 4
        or len(of_key) != 4
        or of_key[0] != of_query[0]
        or of_key[2:] != of_query[2:]
    ):
        raise ValueError(
            f"{OP}: query and key must be [B, Hq, T, D] and [B, Hkv, T, D], but are "
            f"{tuple(of_query)} and {tuple(of_key)}"
        )
    rows, tokens, width = of_query[0], of_query[2], of_query[3]
    if (
        len(of_cos) != 3
        or (of_cos[0] != rows and of_cos[0] != 1)
        or of_cos[1] != tokens
        or of_cos[2] > width
        or of_cos[2] % 2
    ):
        raise ValueError(
            f"{OP}: cos must be [B, T, R] or [1, T, R], here with B = {rows}, T = {tokens} and R "
            f"even and at most {width}, but has shape {tuple(of_cos)}"
        )
    checks.tensor(OP, "sin", sin, shape=tuple(of_cos))


# --- C++ on the CPU: csrc/cpu/rotary_embedding.cpp; Triton on a GPU: triton/rotary_embedding.py ---


def _forward(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Rotated; `transposed`, the gradients of what was rotated so."""
    if cos.dtype is not sin.dtype:
        _, (cos, sin) = dispatch.in_one_dtype(cos, sin)
    if cos.dtype is torch.float64 and query.dtype is not torch.float64:
        wide = _forward(query.double(), key.double(), cos, sin, transposed, impl)
        return wide[0].to(query.dtype), wide[1].to(query.dtype)
    query, key = dispatch.side_by_side(query), dispatch.side_by_side(key)
    cos, sin = dispatch.side_by_side(cos), dispatch.side_by_side(sin)
    out_query, out_key = _empty(query), _empty(key)
    if impl == "triton":
        dispatch.triton_kernels(OP).rotary_embedding(
            query, key, cos, sin, transposed, out_query, out_key
        )
    else:
        dispatch.cpu.rotary_embedding(
            query, key, cos, sin, transposed, out_query, out_key, torch.get_num_threads()
        )
    return out_query, out_key


def _empty(x: Tensor) -> Tensor:
    """Shaped like `x`, `[B, H, T, D]`, over memory ordered `[B, T, H, D]`."""
    _, heads, tokens, width = shape = x.shape
    return x.new_empty_strided(shape, (tokens * heads * width, width, heads * width, 1))


def _rotated(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool, impl: str
) -> Any:
    """`_forward`, recorded where a gradient is wanted."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return _Rotation.apply(query, key, cos, sin, transposed, impl)
    return _forward(query, key, cos, sin, transposed, impl)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        transposed: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.transposed, ctx.impl = transposed, impl
        return _forward(query, key, cos, sin, transposed, impl)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        dispatch.refuse_batches(grad_query, grad_key)
        cos, sin = ctx.saved_tensors
        gradients = _rotated(grad_query, grad_key, cos, sin, not ctx.transposed, ctx.impl)
        return *gradients, None, None, None, None


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op(
    "ppo_kernels::rotary_embedding", mutates_args=(), device_types=dispatch.DEVICES
)
def _rotation_op(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return _forward(query, key, cos, sin, transposed, impl)


@_rotation_op.register_fake
def _(query, key, *rest):  # type: ignore[no-untyped-def]
    return _empty(query), _empty(key)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, cos, sin, ctx.transposed, ctx.impl = inputs
    ctx.save_for_backward(cos, sin)


def _backward_of_op(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _rotation_op(grad_query, grad_key, *ctx.saved_tensors, not ctx.transposed, ctx.impl)
    return *gradients, None, None, None, None


_rotation_op.register_autograd(_backward_of_op, setup_context=_save)

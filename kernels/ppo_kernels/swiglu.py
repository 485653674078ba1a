"""The gate of a feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference
from ppo_kernels.once import once_differentiable

OP = "swiglu"


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) up = gate sigmoid(gate) up (SwiGLU, Shazeer 2020, arXiv:2002.05202).

    Differentiable, once, in both; of a forward pass only these two are kept.

    Args:
        gate, up: `[...]`, of one shape and floating dtype. Read in place if the last dimension is
            contiguous, whatever the strides of the others, as halves of one product are; copied if
            not.
        impl: "auto", or one of `implementations()["swiglu"]`.

    Returns:
        `[...]`, contiguous, of their dtype. It and the gradients are computed in float32 (float64
        in float64) and rounded once.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    checks.tensor(OP, "gate", gate)
    checks.tensor(OP, "up", up, (gate.dtype,), shape=tuple(gate.shape), like=("gate", gate))
    impl = dispatch.resolve(OP, impl, gate.device)
    if impl == "reference":
        return reference.swiglu(gate, up)
    if not dispatch.eager(gate, up):
        gated: Tensor = _forward_op(gate, up, impl)
        return gated
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        gated = _SwiGLU.apply(gate, up, impl)
        return gated
    return _forward(gate, up, impl)


# --- C++ on the CPU: csrc/cpu/swiglu.cpp; Triton on a GPU: triton/swiglu.py -----------------------


def _forward(gate: Tensor, up: Tensor, impl: str) -> Tensor:
    gate, up = _rows(gate), _rows(up)
    y = dispatch.empty_like(gate, gate.dtype)
    if impl == "triton":
        dispatch.triton_kernels(OP).swiglu(gate, up, y)
    else:
        dispatch.cpu.swiglu(gate, up, y, torch.get_num_threads())
    return y


def _backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, impl: str, want_gate: bool, want_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of gate and up, None where not wanted; one of them is."""
    grad_y, gate, up = _rows(grad_y), _rows(gate), _rows(up)
    grad_gate = dispatch.empty_like(gate, gate.dtype) if want_gate else None
    grad_up = dispatch.empty_like(gate, gate.dtype) if want_up else None
    if impl == "triton":
        dispatch.triton_kernels(OP).swiglu_backward(grad_y, gate, up, grad_gate, grad_up)
    else:
        dispatch.cpu.swiglu_backward(grad_y, gate, up, grad_gate, grad_up, torch.get_num_threads())
    return grad_gate, grad_up


def _rows(x: Tensor) -> Tensor:
    return dispatch.side_by_side(x) if x.dim() else x


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.impl = impl
        return _forward(gate, up, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *_backward(grad_y, gate, up, ctx.impl, *ctx.needs_input_grad[:2]), None


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op("ppo_kernels::swiglu", mutates_args=(), device_types=dispatch.DEVICES)
def _forward_op(gate: Tensor, up: Tensor, impl: str) -> Tensor:
    return _forward(gate, up, impl)


@_forward_op.register_fake
def _(gate, up, impl):  # type: ignore[no-untyped-def]
    return dispatch.empty_like(gate, gate.dtype)


@torch.library.custom_op(
    "ppo_kernels::swiglu_backward", mutates_args=(), device_types=dispatch.DEVICES
)
def _backward_op(
    grad_y: Tensor, gate: Tensor, up: Tensor, impl: str, want_gate: bool, want_up: bool
) -> tuple[Tensor, Tensor]:
    found = _backward(grad_y, gate, up, impl, want_gate, want_up)
    grad_gate, grad_up = (gate.new_empty(0) if g is None else g for g in found)
    return grad_gate, grad_up


@_backward_op.register_fake
def _(grad_y, gate, up, impl, want_gate, want_up):  # type: ignore[no-untyped-def]
    grad_gate, grad_up = (
        dispatch.empty_like(gate, gate.dtype) if want else gate.new_empty(0)
        for want in (want_gate, want_up)
    )
    return grad_gate, grad_up


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.impl = inputs
    ctx.save_for_backward(gate, up)


def _backward_of_op(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    found = _backward_op(grad_y, *ctx.saved_tensors, ctx.impl, *wanted)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), None


_forward_op.register_autograd(_backward_of_op, setup_context=_save)

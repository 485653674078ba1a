"""`swiglu`: y = a s u with s = sigmoid(a), a tile of rows and columns per program; of contiguous
tensors, a piece of one row.

Backward, for gradients g of y; s is made anew of a, which has to be read anyway:

  da = g u s (1 + a (1 - s)),  du = g a s

1 - s is sigmoid(-a): taken from 1, it would lose its digits where a is large.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on
from ppo_kernels.triton.common import exp, furthest, load, logit_row
from ppo_kernels.triton.launch import OPTIONS, SIZES, logit_rows

_NUMBERS = 1024  # of a program
_WARPS = 4


@triton.jit
def _sigmoid(x):
    """(sigmoid(x), sigmoid(-x)), by e^-|x|; NaN stays."""
    size = tl.abs(x)
    far = size > furthest(x)
    e = tl.where(far, 0.0, exp(tl.where(far, 0.0, -size)))
    of_size = 1.0 / (1.0 + e)
    rest = e * of_size
    return tl.where(x < 0.0, rest, of_size), tl.where(x < 0.0, of_size, rest)


@triton.jit
def _tile(width, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows `[ROWS, 1]`, columns `[1, COLUMNS]`, which are inside) of a program."""
    tiles = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    i = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    j = (program % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return i, j, (i < count) & (j < width)


@triton.jit(do_not_specialize=[*SIZES, "up_inner"])
def gated(
    gate, up, y, width: tl.int64, count: tl.int64, inner: tl.int64, gate_outer: tl.int64,
    gate_stride: tl.int64, up_inner: tl.int64, up_outer: tl.int64, up_stride: tl.int64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`y` is contiguous, `[count, width]`."""
    i, j, inside = _tile(width, count, ROWS, COLUMNS)
    a = load(gate + logit_row(i, inner, gate_outer, gate_stride), j, inside, DTYPE)
    u = load(up + logit_row(i, up_inner, up_outer, up_stride), j, inside, DTYPE)
    s, _ = _sigmoid(a)
    tl.store(y + i * width + j, (a * s * u).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "up_inner", "grad_inner"])
def gated_backward(
    grad_y, gate, up, grad_gate, grad_up, width: tl.int64, count: tl.int64, grad_inner: tl.int64,
    grad_outer: tl.int64, grad_stride: tl.int64, inner: tl.int64, gate_outer: tl.int64,
    gate_stride: tl.int64, up_inner: tl.int64, up_outer: tl.int64, up_stride: tl.int64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients are contiguous, `[count, width]`, or None."""
    i, j, inside = _tile(width, count, ROWS, COLUMNS)
    g = load(grad_y + logit_row(i, grad_inner, grad_outer, grad_stride), j, inside, DTYPE)
    a = load(gate + logit_row(i, inner, gate_outer, gate_stride), j, inside, DTYPE)
    s, of_minus = _sigmoid(a)
    if grad_gate is not None:
        u = load(up + logit_row(i, up_inner, up_outer, up_stride), j, inside, DTYPE)
        da = g * u * (s * (1.0 + a * of_minus))
        tl.store(grad_gate + i * width + j, da.to(grad_gate.dtype.element_ty), mask=inside)
    if grad_up is not None:
        du = g * (a * s)
        tl.store(grad_up + i * width + j, du.to(grad_up.dtype.element_ty), mask=inside)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], *outputs: Tensor | None) -> None:
    """`kernel` on inputs of one shape and dtype, the last stride 1; outputs are contiguous."""
    numbers = inputs[0].numel()
    if not numbers:
        return
    if all(x.is_contiguous() for x in inputs):
        inputs = tuple(x.view(-1) for x in inputs)
    width = inputs[0].shape[-1]
    count = numbers // width
    columns = min(triton.next_power_of_2(width), _NUMBERS)
    rows = min(triton.next_power_of_2(count), _NUMBERS // columns)
    dtype = tl.float64 if inputs[0].dtype == torch.float64 else tl.float32
    pointers, *places = zip(*map(logit_rows, inputs), strict=True)
    strides = [x for of_input in zip(*places, strict=True) for x in of_input]
    programs = triton.cdiv(count, rows) * triton.cdiv(width, columns)
    with on(inputs[0].device):
        kernel[(programs,)](
            *pointers, *outputs, width, count, *strides, rows, columns, dtype, num_warps=_WARPS,
            **OPTIONS,
        )  # fmt: skip


def swiglu(gate: Tensor, up: Tensor, y: Tensor) -> None:
    """Fill `y`."""
    _launch(gated, (gate, up), y)


def swiglu_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor | None, grad_up: Tensor | None
) -> None:
    """Fill the gradients that are not None."""
    _launch(gated_backward, (grad_y, gate, up), grad_gate, grad_up)

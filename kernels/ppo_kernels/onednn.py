"""Products in float32 by oneDNN, where torch's own, which are MKL's, leave half of a CPU unused.

MKL runs AVX2 on CPUs of AMD, also where they have AVX-512: 1,000 rows take twice the time of
oneDNN's (bench/notes/cpu.md). torch has oneDNN's product for Inductor alone, so it is tried first.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_kernels.once import once_differentiable

_CPU_INFO = Path("/proc/cpuinfo")  # Linux's
_FEWEST = 64  # rows; for fewer, oneDNN's own order of the weight costs more than it brings


@functools.cache
def is_faster() -> bool:
    """Whether this CPU is one of AMD with AVX-512, and torch's oneDNN multiplies."""
    try:
        told = _CPU_INFO.read_text()
    except OSError:
        return False
    if "AuthenticAMD" not in told or not torch.cpu._is_avx512_supported():
        return False
    x, weight = (
        torch.arange(rows * 3, dtype=torch.float32, device="cpu").view(rows, 3) for rows in (2, 4)
    )
    try:
        return torch.equal(product(x, weight), x @ weight.t())
    except (RuntimeError, AttributeError, TypeError):  # another version's operator
        return False


def pays(x: Tensor) -> bool:
    """Whether the product of `x` `[..., in]` with a weight is better oneDNN's."""
    enough = x.dtype is torch.float32 and x.numel() >= _FEWEST * max(x.shape[-1], 1)
    return enough and x.device.type == "cpu" and is_faster()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of float32 `[..., in]` and `[out, in]`, whatever their strides."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with gradients, by oneDNN where `is_faster` and it pays."""
    if not pays(x):
        return torch.nn.functional.linear(x, weight, bias)
    made: Tensor = _Linear.apply(x, weight, bias)
    return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, read = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            product(grad, weight.t()) if of_x else None,
            product(rows.t(), read.t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )

"""Matrix products in float64, changed at random as far as rounding to a narrow dtype would.

Nothing here multiplies in the narrow dtype, so nothing depends on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Round = Callable[[Tensor], Tensor]


def at_random(dtype: torch.dtype, seed: int, units: float) -> Round:
    """Change float64 numbers by up to so many units in the last place of `dtype`, up or down.

    Not to a neighbour in `dtype`: a number that happens to lie next to one would hardly change,
    though a sum in another order may end at the next.
    """
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)

    def change(x: Tensor) -> Tensor:
        unit = info.eps * x.abs().clamp(min=info.tiny)  # below tiny the units are all alike
        up_or_down = 2 * torch.rand(x.shape, dtype=torch.float64, generator=generator) - 1
        return torch.where(x == 0, 0.0, x + units * unit * up_or_down)

    return change


class Rounded(TorchFunctionMode):
    """While it is on, `F.linear` of float64 tensors, and its gradients, are rounded at random in
    all the places where products in `dtype` are rounded, by up to so many units."""

    def __init__(self, dtype: torch.dtype, seed: int, units: float = 1.0) -> None:
        super().__init__()
        self._dtype, self._round = dtype, at_random(dtype, seed, units)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is functional.linear:
            return _Linear.apply(*args, self._dtype, self._round)
        return function(*args, **kwargs or {})


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        round_: Round,
    ) -> Tensor:
        # Factors have one right rounding: as they are, or where autocast makes them narrow, this.
        hidden, weight = hidden.to(dtype).double(), weight.to(dtype).double()
        ctx.save_for_backward(hidden, weight)
        ctx.round, ctx.has_bias = round_, bias is not None
        logits = round_(hidden @ weight.T)
        return logits if bias is None else round_(logits + bias.to(dtype).double())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        grad = ctx.round(grad)
        flat = grad.reshape(-1, grad.shape[-1])
        of_weight = ctx.round(flat.T @ hidden.reshape(-1, hidden.shape[-1]))
        of_bias = ctx.round(flat.sum(0)) if ctx.has_bias else None
        return ctx.round(grad @ weight), of_weight, of_bias, None, None

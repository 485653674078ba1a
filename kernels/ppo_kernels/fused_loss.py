"""Autograd for losses that make their gradients in the forward pass.

Such a loss is `compute(*inputs)`. Its inputs begin with the `trained` differentiable tensors and
end with as many bools, which of their gradients are wanted. It returns (loss, statistics, the
gradient of each, empty where not wanted). Backward only multiplies by the gradient that comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wanted(*trained: Tensor | None) -> list[bool]:
    """Which of them autograd wants a gradient of."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in trained]


def gradient_like(loss: Tensor, shape: torch.Size, want: bool) -> Tensor:
    """Room for a gradient, in the accumulation dtype: float16 might lose what scaling restores."""
    return loss.new_empty(shape if want else (0,))


class FusedLoss(torch.autograd.Function):
    """In eager mode: `loss, stats = FusedLoss.apply(compute, trained, *inputs)`."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., tuple[Tensor, ...]], trained: int, *inputs: Any
    ) -> tuple[Tensor, Tensor]:
        loss, stats, *gradients = compute(*inputs)
        _save(ctx, trained, inputs, gradients)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return None, None, *_chain(ctx, grad_loss)


def register(op: Any, trained: int) -> None:
    """The same for `op`, the custom op of `compute`, in a graph."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, trained, inputs, output[2:])

    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _chain(ctx, grad_loss)

    op.register_autograd(backward, setup_context=setup_context)


def _save(ctx: Any, trained: int, inputs: tuple[Any, ...], gradients: Any) -> None:
    ctx.save_for_backward(*gradients)
    pairs = zip(inputs[:trained], inputs[-trained:], strict=True)
    ctx.dtypes = [x.dtype if want else None for x, want in pairs]
    ctx.constants = len(inputs) - trained


def _chain(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(ctx.dtypes)
    if grad_loss is not None:
        for i, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            gradients[i] = None if dtype is None else (gradient * grad_loss).to(dtype)
    return *gradients, *(None,) * ctx.constants

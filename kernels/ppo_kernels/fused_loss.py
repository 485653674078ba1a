"""Autograd for losses that compute their gradients in the forward pass.

Such a loss returns (loss, statistics, the gradient of each trained tensor or None where that is not
wanted), and in a graph maybe more. Backward only multiplies by the incoming gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_kernels import dispatch
from ppo_kernels.once import once_differentiable

Results = tuple[Any, ...]  # loss, statistics, gradients


def wanted(*trained: Tensor | None) -> list[bool]:
    """Which of them need a gradient."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in trained]


def gradient_like(x: Tensor, loss: Tensor, want: bool) -> Tensor | None:
    """An empty gradient, in the accumulation dtype: float16 might lose what scaling restores."""
    return dispatch.empty_like(x, loss.dtype) if want else None


def without_none(results: Results) -> Results:
    """As a custom op returns them: empty where not wanted."""
    return tuple(results[0].new_empty(0) if x is None else x for x in results)


def attach(results: Results, trained: tuple[Tensor | None, ...], want: list[bool]) -> Tensor:
    """The loss of `results`, in eager mode, as a function of the `trained` tensors."""
    if not any(want):
        return results[0]
    loss: Tensor = _FusedLoss.apply(results, want, *trained)
    return loss


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, results: Results, want: list[bool], *trained: Tensor | None) -> Tensor:
        _save(ctx, trained, want, results[2:])
        ctx.trained = trained  # not saved: they may change in place, their gradients are made
        loss: Tensor = results[0]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        graph_stays = torch._C._autograd._get_current_graph_task_keep_graph()
        if not graph_stays:
            ctx.trained = None
        return None, None, *_chain(ctx, lambda x: _multiplied(x, grad_loss, graph_stays))


def register(op: Any, trained: int) -> None:
    """The same for a custom op, in a graph. Its inputs begin with the trained tensors, and end with
    as many bools, one for each: whether its gradient is wanted."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        _save(ctx, inputs[:trained], inputs[-trained:], output[2 : 2 + trained])
        ctx.constants = len(inputs) - trained

    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *_chain(ctx, lambda x: x * grad_loss), *(None,) * ctx.constants

    op.register_autograd(backward, setup_context=setup_context)


def _save(ctx: Any, trained: Any, want: Any, gradients: Any) -> None:
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [x.dtype if wants else None for x, wants in zip(trained, want, strict=True)]


def _chain(ctx: Any, multiplied: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return [None if dtype is None else multiplied(x).to(dtype) for x, dtype in pairs]


def _multiplied(x: Tensor, by: Tensor, graph_stays: bool) -> Tensor:
    """`x` times a 0-dim tensor; for free where that is 1, as `loss.backward()` brings it.

    `x` itself is given only where the graph, and what it saved, is not needed again: whoever gets a
    gradient may change it in place.
    """
    if by.is_cpu and type(by) is Tensor and not graph_stays and by.item() == 1.0:
        return x
    # A kernel checks this, as the host would have to wait for a GPU. In place.
    if by.is_cuda and type(by) is Tensor and dispatch.HAS_TRITON and not graph_stays:
        scaled: Tensor = dispatch.triton_kernels("fused_loss").scale(x, by)
        return scaled
    return x * by

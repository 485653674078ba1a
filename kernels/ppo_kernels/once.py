"""Gradients that are differentiable once, and say so when they are differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_kernels import dispatch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an `autograd.Function`, below `staticmethod`: differentiating what it
    returns is an error. The tensors that the op is differentiable in are `ctx.trained`, where it
    has that, or among those that are saved.

    With torch's own the second-order terms may be left out without a word: where the gradients that
    come in do not require one, as those of a plain sum, and where `torch.autograd.grad` is asked
    for the second derivative, which runs no node that does not lead to its inputs.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> Any:
        dispatch.refuse_batches(*gradients)
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        trained = getattr(ctx, "trained", None)
        if trained is None:
            ctx = _Read(ctx)
            trained = ctx.saved_tensors
        led_to = [x for x in (*gradients, *trained) if x is not None and x.requires_grad]
        with torch.no_grad():
            found = backward(ctx, *gradients)
        made = [x for x in found if x is not None]
        marked = iter(_Once.apply(len(made), *made, *led_to))
        return tuple(None if x is None else next(marked) for x in found)

    return wrapper


class _Read:
    """A context whose saved tensors are read once, as checkpointing demands."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Once(torch.autograd.Function):
    """The first `count` tensors, as a function of the others that nobody can differentiate."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "an op of ppo_kernels can be differentiated once: for second derivatives (a gradient "
            "penalty, a Hessian's product) call it with impl='reference'"
        )

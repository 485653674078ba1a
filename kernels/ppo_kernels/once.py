"""Gradients that are differentiable once, and say so when they are differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an `autograd.Function`, below `staticmethod`: differentiating what it
    returns is an error.

    Torch's own asks whether the gradients that come in require one. With `create_graph=True` those
    of a plain sum do not, and the second-order terms would be left out without a word.
    """
    once = function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            gradients = tuple(x if x is None else x.detach().requires_grad_() for x in gradients)
        return once(ctx, *gradients)

    return wrapper

"""The small operations of a model while it decodes: norms and rotary embedding, each as one kernel.

Families write a root mean square norm as seven operations and a rotary embedding as sixteen, on a
few rows, whose launches take longer than what they compute. Whatever a family's is called, it is
replaced where it is seen to give what the kernel gives, and nowhere else.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ppo_kernels import rms_norm, rotary_embedding

_Rotate = Callable[..., tuple[Tensor, Tensor]]
_ROTATE = "apply_rotary_pos_emb"  # the name of a family's function, in the module of its models


class Fused:
    """Those of `model`, whose weights are in the compute `dtype`. Without gradients."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        found = ((module, _added(module, dtype)) for module in model.modules())
        self._norms: list[tuple[Any, float]] = [
            (x, added) for x, added in found if added is not None
        ]
        families = {sys.modules[type(module).__module__] for module in model.modules()}
        functions = ((family, getattr(family, _ROTATE, None)) for family in families)
        self._rotations = [(family, f) for family, f in functions if f is not None and _rotates(f)]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, they are kernels; so is the rotary embedding of other models of the family."""
        try:
            for module, added in self._norms:
                vars(module)["forward"] = partial(
                    rms_norm, weight=module.weight.detach(), eps=_epsilon(module), added=added
                )
            for family, rotate in self._rotations:
                setattr(family, _ROTATE, _rotation(rotate))
            yield
        finally:
            for module, _ in self._norms:
                vars(module).pop("forward", None)
            for family, rotate in self._rotations:
                setattr(family, _ROTATE, rotate)


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _added(module: Any, dtype: torch.dtype) -> float | None:
    """What the norm `module` adds to its weight; None where it is not such a norm.

    Seen with a weight and an input in fp32, as rounding would hide a difference.
    """
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    name = type(module).__name__
    if not (name.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.ndim == 1):
        return None
    if not isinstance(epsilon, float) or "forward" in vars(module) or weight.dtype != dtype:
        return None
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, 1, -1)
    # Before any training, weights may all be 1, so that 1 more is twice as much.
    other = torch.linspace(0.5, 2, len(weight), device=weight.device)
    expected = functional_call(module, {"weight": other}, x)
    for added in (0.0, 1.0):
        found = rms_norm(x, other, eps=epsilon, added=added)
        same_kind = expected.shape == found.shape and expected.dtype == found.dtype
        if same_kind and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return added
    return None


def _rotation(rotate: _Rotate) -> _Rotate:
    """The kernel in the place of a family's function."""

    def rotated(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if args or kwargs:  # the heads in another dimension
            return rotate(q, k, cos, sin, *args, **kwargs)
        return rotary_embedding(q, k, cos, sin)

    return rotated


@torch.no_grad()
def _rotates(function: _Rotate) -> bool:
    """Whether a family's function gives what `rotary_embedding` gives."""
    q, k = (torch.linspace(-2, 3, heads * 48).view(2, heads, 3, 8) for heads in (4, 2))
    cos, sin = (torch.linspace(a, b, 48).view(2, 3, 8) for a, b in ((-1, 1), (1, 0)))
    try:
        found = torch.cat(function(q, k, cos, sin), 1)
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return False
    expected = torch.cat(rotary_embedding(q, k, cos, sin), 1)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)

"""The norms of a model while it decodes: each as one kernel.

Families write root mean square norms (Zhang & Sennrich 2019, arXiv:1910.07467) as seven operations
on a few rows, whose launches take longer than what they compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import rms_norm


class Norms:
    """Those of `model` whose forward is seen to be torch's `rms_norm` with their weight, or with 1
    more than it, as Gemma's; others stay as they are."""

    def __init__(self, model: nn.Module) -> None:
        found = ((module, _added(module)) for module in model.modules())
        self._norms: list[tuple[Any, int]] = [(x, added) for x, added in found if added is not None]
        # Where something is added, the sum has an address of its own, which graphs read.
        self._sums = [
            torch.empty_like(module.weight) if added else None for module, added in self._norms
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights as they are now."""
        for (module, added), of_module in zip(self._norms, self._sums, strict=True):
            if of_module is not None:
                torch.add(module.weight, added, out=of_module)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the norms are one kernel each; without gradients."""
        try:
            for (module, _), of_module in zip(self._norms, self._sums, strict=True):
                weight = module.weight if of_module is None else of_module
                shape = list(weight.shape)
                vars(module)["forward"] = partial(
                    rms_norm, normalized_shape=shape, weight=weight, eps=_epsilon(module)
                )
            yield
        finally:
            for module, _ in self._norms:
                vars(module).pop("forward", None)


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _added(module: Any) -> int | None:
    """What the norm `module` adds to its weight; None where it is not such a norm."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    name = type(module).__name__
    if not (name.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.ndim == 1):
        return None
    if not isinstance(epsilon, float) or "forward" in vars(module):
        return None
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, 1, -1)
    # Before any training, weights may all be 1, so that 1 more is twice as much.
    other = torch.linspace(0.5, 2, len(weight), device=weight.device).to(weight.dtype)
    expected = functional_call(module, {"weight": other}, x)
    for added in (0, 1):
        found = rms_norm(x, list(weight.shape), other.float() + added, epsilon)
        same_kind = expected.shape == found.shape and weight.dtype == expected.dtype == found.dtype
        if same_kind and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return added
    return None

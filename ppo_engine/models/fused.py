"""What stands around and in a model's matrix products, as kernels: norms, rotary embedding, gates.

Families write a root mean square norm as seven operations and a rotary embedding as sixteen, each
of which reads and writes all states. Whatever a family's is called, it is replaced where it is seen
to give what the kernel gives, and nowhere else.
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

from ppo_engine.models.remade import Remade
from ppo_kernels import onednn, rms_norm, rotary_embedding, swiglu

_Rotate = Callable[..., tuple[Tensor, Tensor]]
_ROTATE = "apply_rotary_pos_emb"  # the name of a family's function, in the module of its models
_ROUNDED = 4  # times by which a gate of other roundings may differ


class Fused:
    """Those of `model`, whose weights are in the compute `dtype`; its float32 products by the
    library that has the faster ones, unless `products` is False."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, products: bool = True) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self.remade = Remade()
        linear = products and dtype == torch.float32 and onednn.is_faster()
        for module in model.modules():
            if "forward" in vars(module):  # something else has replaced it
                continue
            if (added := _added(module, dtype)) is not None:
                self._forwards.append((module, partial(_norm, module, added, self.remade)))
            elif _is_gated(module, dtype):
                self._forwards.append((module, partial(_gated, module, self.remade)))
            elif linear and _is_plain(module, dtype):
                self._forwards.append((module, partial(_linear, module)))
        families = {sys.modules[type(module).__module__] for module in model.modules()}
        functions = ((family, getattr(family, _ROTATE, None)) for family in families)
        self._rotations = [(family, f) for family, f in functions if f is not None and _rotates(f)]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, they are kernels; so is the rotary embedding of other models of the family."""
        try:
            for module, forward in self._forwards:
                vars(module)["forward"] = forward
            for family, rotate in self._rotations:
                setattr(family, _ROTATE, _rotation(rotate))
            yield
        finally:
            for module, _ in self._forwards:
                vars(module).pop("forward", None)
            for family, rotate in self._rotations:
                setattr(family, _ROTATE, rotate)


def _norm(module: Any, added: float, remade: Remade, x: Tensor) -> Tensor:
    return remade(partial(rms_norm, eps=_epsilon(module), added=added), x, module.weight)


def _gated(module: Any, remade: Remade, x: Tensor) -> Tensor:
    found: Tensor = module.down_proj(remade(swiglu, module.gate_proj(x), module.up_proj(x)))
    return found


def _linear(module: Any, x: Tensor) -> Tensor:
    return onednn.linear(x, module.weight, module.bias)


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    """Whether a layer is a matrix in `dtype` and perhaps a bias, and nothing else."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.dtype == dtype
        and module.weight.device.type == "cpu"
    )


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
    if not isinstance(epsilon, float) or weight.dtype != dtype:
        return None
    count, single = len(weight), torch.float32
    x = torch.linspace(-2, 3, 2 * count, dtype=single, device=weight.device).view(2, 1, -1)
    # Before any training, weights may all be 1, so that 1 more is twice as much.
    other = torch.linspace(0.5, 2, count, dtype=single, device=weight.device)
    expected = functional_call(module, {"weight": other}, x)
    for added in (0.0, 1.0):
        found = rms_norm(x, other, eps=epsilon, added=added)
        same_kind = expected.shape == found.shape and expected.dtype == found.dtype
        if same_kind and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return added
    return None


@torch.no_grad()
def _is_gated(module: Any, dtype: torch.dtype) -> bool:
    """Whether a feed-forward layer is `down(silu(gate(x)) up(x))`."""
    layers = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if not all(isinstance(layer, nn.Module) for layer in layers):
        return False
    weight = getattr(layers[0], "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != dtype or weight.ndim != 2:
        return False
    x = torch.linspace(-2, 3, weight.shape[1], device=weight.device, dtype=dtype)[None, None]
    try:
        expected = module(x)
    except (TypeError, ValueError, RuntimeError):  # it reads something else
        return False
    if not isinstance(expected, Tensor):
        return False
    found = _gated(module, Remade(), x)
    error, size = (found - expected).float().norm(), expected.float().norm()
    return found.shape == expected.shape and bool(error <= _ROUNDED * torch.finfo(dtype).eps * size)


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
    line = partial(torch.linspace, dtype=torch.float32)
    q, k = (line(-2, 3, heads * 48).view(2, heads, 3, 8) for heads in (4, 2))
    cos, sin = (line(a, b, 48).view(2, 3, 8) for a, b in ((-1, 1), (1, 0)))
    try:
        found = torch.cat(function(q, k, cos, sin), 1)
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return False
    expected = torch.cat(rotary_embedding(q, k, cos, sin), 1)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)

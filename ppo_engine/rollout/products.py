"""The products of a model's linear layers while it decodes: a few rows with every weight there is.

On a CPU that can the weights are packed (`packed_linear`), once for as many steps as a rollout has.
Layers that read the same input (query, key and value; gate and up; LoRA's down-projections) are one
product. The model's own forward runs around them. Elsewhere, as on a GPU, weights are used as they
are: they have the compute dtype.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ppo_engine.pretrained import architecture
from ppo_kernels import PackedWeight, can_pack, pack_weight, packed_linear

Forward = Callable[[Tensor], Tensor]


class Products:
    """Those of `model`, a causal language model, perhaps with adapters, on `device`, whose weights
    are in `dtype`.

    Layers that are more than a matrix (quantized, wrapped, or with a forward that something has
    replaced), or have weights of another dtype, stay as they are; inside an adapter's wrapper the
    matrices are found.

    `packed` says whether weights are packed.
    """

    def __init__(self, model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self.packed = device.type == "cpu" and can_pack(dtype)
        groups = _by_input(model, dtype) if self.packed else []
        self._products = [
            _Product(layers, f"_product_{place}") for place, layers in enumerate(groups)
        ]

    def refresh(self) -> None:
        """Take the weights as they are now."""
        for product in self._products:
            product.refresh()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model's layers multiply with what `refresh` took, inside the context and nowhere
        else. Without gradients; not for `torch.inference_mode`, whose tensors have no version."""
        layers = [layer for product in self._products for layer in product.layers]
        forwards = [forward for product in self._products for forward in product.forwards()]
        try:
            for layer, forward in zip(layers, forwards, strict=True):
                vars(layer)["forward"] = forward
            with torch.no_grad():
                yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def release(self) -> None:
        """Free what `refresh` took."""
        for product in self._products:
            product.release()


class _Product:
    """Linear `layers` with weights of one dtype that read the same input, as one product.

    The first that is called with an input computes for all of them; the parts of the others wait
    as the attribute `name` of the input itself, and so live no longer than it.
    """

    def __init__(self, layers: Sequence[Any], name: str) -> None:
        self.layers = layers
        self._name = name
        self._sizes = [len(_matrix(layer)) for layer in layers]
        self._weight: PackedWeight | None = None
        self._bias: Tensor | None = None

    def refresh(self) -> None:
        matrices = [_matrix(layer) for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        if any(bias is not None for bias in biases):
            rows_of = zip(matrices, biases, strict=True)
            self._bias = torch.cat(
                [m.new_zeros(len(m)) if b is None else b.detach() for m, b in rows_of]
            )
        self._weight = pack_weight(*matrices, dtype=matrices[0].dtype)

    def release(self) -> None:
        self._weight = self._bias = None

    def forwards(self) -> list[Forward]:
        """What each of the layers does in place of its own forward."""
        if self._weight is None:
            raise RuntimeError("refresh() takes the weights; it was not called, or they were freed")
        if len(self.layers) == 1:
            return [self._multiply]
        return [functools.partial(self._part, index) for index in range(len(self.layers))]

    def _part(self, index: int, x: Tensor) -> Tensor:
        version, parts = x.__dict__.get(self._name, (None, {}))
        # Another version: `x` has been written to. No part: the layer runs again.
        if version != x._version or index not in parts:
            parts = dict(enumerate(self._multiply(x).split(self._sizes, -1)))
            x.__dict__[self._name] = (x._version, parts)
        return parts.pop(index)

    def _multiply(self, x: Tensor) -> Tensor:
        assert self._weight is not None
        return packed_linear(x, self._weight, self._bias)


def _matrix(layer: Any) -> Tensor:
    """The weights of a linear layer, `[out, in]`; without gradient, the same memory."""
    weight: Tensor = layer.weight.detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _is_matrix(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `layer` is a matrix in `dtype` and perhaps a bias, and nothing else. Libraries
    quantize by a class of their own, for the layer or its weight, and offload by replacing its
    forward."""
    plain = type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer)
    return plain and type(layer.weight) is nn.Parameter and layer.weight.dtype == dtype


def _by_input(model: nn.Module, dtype: torch.dtype) -> list[list[nn.Module]]:
    """Its linear layers with weights in `dtype`; together those that read the very same tensor in a
    pass of two tokens."""
    layers = [layer for layer in model.modules() if _is_matrix(layer, dtype)]
    seen: list[Tensor] = []  # all inputs are kept, so that no two have the same id
    read: dict[nn.Module, tuple[Any, ...]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])
        read[layer] = (id(inputs[0]), inputs[0]._version)

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(**architecture.base_inputs(architecture.unwrap(model), ids, torch.ones_like(ids)))
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[Any, list[nn.Module]] = defaultdict(list)
    for layer in layers:
        groups[read.get(layer, layer)].append(layer)  # one that was not reached stays alone
    return list(groups.values())

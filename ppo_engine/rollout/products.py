"""The products of a model's linear layers while it decodes: a few rows with every weight there is.

On a CPU that can the weights are packed (`packed_linear`), once for as many steps as a rollout has;
on a GPU they are copied to the compute dtype, to the same addresses each time, so that captured
graphs go on. In both, layers that read the same input (query, key and value; gate and up; LoRA's
down-projections) are one product. The model's own forward runs around them.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ppo_engine.models import precision
from ppo_engine.pretrained import architecture
from ppo_kernels import PackedWeight, can_pack, pack_weight, packed_linear

Forward = Callable[[Tensor], Tensor]


class Products:
    """Those of `model`, a causal language model, perhaps with adapters, on `device` in `dtype`.

    A layer's input is cast to `dtype`, and so is what it gives, as under autocast. Layers that are
    more than a matrix (quantized, wrapped, or with a forward that something has replaced) stay as
    they are; inside an adapter's wrapper the matrices are found.

    `packed` says whether weights are packed.
    """

    def __init__(self, model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self.packed = device.type == "cpu" and can_pack(dtype)
        self._on_cpu = device.type == "cpu"
        self._products: list[_Product] = []
        with precision.compute(device, dtype):
            groups = _by_input(model)
        for layers in groups:
            # A weight that is used as it is cannot be part of a larger one without a copy.
            alone = not self.packed and layers[0].weight.dtype == dtype
            for part in [[layer] for layer in layers] if alone else [layers]:
                name = f"_product_{len(self._products)}"
                self._products.append(_Product(part, dtype, self.packed, name))

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
        """Free on a CPU what `refresh` took. On a GPU it stays, for graphs that read it."""
        if self._on_cpu:
            for product in self._products:
                product.release()


class _Product:
    """Linear `layers` with weights of one dtype that read the same input, as one product.

    The first that is called with an input computes for all of them; the parts of the others wait
    as the attribute `name` of the input itself, and so live no longer than it.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, packed: bool, name: str) -> None:
        self.layers = layers
        self._dtype = dtype
        self._packed = packed
        self._name = name
        self._sizes = [len(_matrix(layer)) for layer in layers]
        self._weight: Tensor | PackedWeight | None = None
        self._bias: Tensor | None = None

    def refresh(self) -> None:
        matrices = [_matrix(layer) for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        if any(bias is not None for bias in biases):
            rows_of = zip(matrices, biases, strict=True)
            self._bias = self._taken(
                [m.new_zeros(len(m)) if b is None else b.detach() for m, b in rows_of], self._bias
            )
        if self._packed:
            self._weight = pack_weight(*matrices, dtype=self._dtype)
        else:
            assert not isinstance(self._weight, PackedWeight)
            self._weight = self._taken(matrices, self._weight)

    def _taken(self, parts: list[Tensor], buffer: Tensor | None) -> Tensor:
        """`parts` in the compute dtype, one below the other: in `buffer` where there is one; one
        part that has the dtype already is itself."""
        if len(parts) == 1 and parts[0].dtype == self._dtype:
            return parts[0]
        if buffer is None:
            shape = (sum(self._sizes), *parts[0].shape[1:])
            buffer = parts[0].new_empty(shape, dtype=self._dtype)
        for place, part in zip(buffer.split(self._sizes), parts, strict=True):
            place.copy_(part)
        return buffer

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
        if isinstance(self._weight, PackedWeight):
            return packed_linear(x, self._weight, self._bias)
        return F.linear(x.to(self._dtype), self._weight, self._bias)


def _matrix(layer: Any) -> Tensor:
    """The weights of a linear layer, `[out, in]`; without gradient, the same memory."""
    weight: Tensor = layer.weight.detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _is_matrix(layer: nn.Module) -> bool:
    """Whether `layer` is a matrix and perhaps a bias, and nothing else. Libraries quantize by a
    class of their own, for the layer or its weight, and offload by replacing its forward."""
    plain = type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer)
    return plain and type(layer.weight) is nn.Parameter


def _by_input(model: nn.Module) -> list[list[nn.Module]]:
    """Its linear layers; together those that read the very same tensor in a pass of two tokens, and
    have weights of one dtype. The pass must be in the arithmetic of the steps: a cast in between
    is another tensor."""
    layers = [layer for layer in model.modules() if _is_matrix(layer)]
    seen: list[Tensor] = []  # all inputs are kept, so that no two have the same id
    read: dict[nn.Module, tuple[Any, ...]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])
        read[layer] = (id(inputs[0]), inputs[0]._version, layer.weight.dtype)

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

"""What a pass does not keep for its gradients, as a kernel makes it again from what is kept anyway.

The products of a layer keep their inputs, of which a norm's output and a gated one are over a
quarter of all that a pass keeps; both take a kernel at the speed of memory to make, from a norm's
input, or from the gate and what it lets through, which their own gradients need.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Remade:
    """Outputs of kernels, made again where gradients need them."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}  # those that there are now, by their memory
        self._active = False

    def __call__(self, kernel: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`kernel(*inputs)`, which gives the same bits each time."""
        made = kernel(*inputs)
        if self._active and made.requires_grad:
            address = made.untyped_storage().data_ptr()
            # Forgotten with the tensor: a checkpointed layer keeps none, and memory is used again.
            alive = weakref.ref(made, lambda _: self._outputs.pop(address, None))
            kept = [_Kept.of(x) for x in inputs]
            self._outputs[address] = _Output(kernel, kept, made.dtype, made._version, alive)
        return made

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, operations that would keep such an output, or a view of it, do not."""
        self._active = True
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._active = False
            self._outputs.clear()

    def _pack(self, x: Tensor) -> _Kept | _View:
        output = self._outputs.get(x.untyped_storage().data_ptr())
        if output is None or (output.dtype, output.version) != (x.dtype, x._version):
            return _Kept.of(x)
        output.views += 1
        return _View(output, x.shape, x.stride(), int(x.storage_offset()))


class _Output:
    """What makes an output: once for all its views, which gradients need at about one time."""

    def __init__(
        self,
        kernel: Callable[..., Tensor],
        inputs: list[_Kept],
        dtype: torch.dtype,
        version: int,
        alive: weakref.ref[Tensor],
    ) -> None:
        self.dtype, self.version, self.views = dtype, version, 0
        self._kernel, self._inputs, self._alive = kernel, inputs, alive
        self._made: Tensor | None = None
        self._left = 0  # views that are yet to be asked for

    def make(self) -> Tensor:
        if self._made is None:
            with torch.no_grad():
                inputs = [x.get() for x in self._inputs]
                self._made, self._left = self._kernel(*inputs), self.views
        made, self._left = self._made, self._left - 1
        if not self._left:
            self._made = None
        return made


class _Kept(NamedTuple):
    """A tensor, and which change of it: autograd itself checks only what is not packed."""

    x: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor) -> _Kept:
        # Without its graph: an operation that keeps what it gives would keep itself.
        return cls(x if x.is_leaf else x.detach(), x._version)

    def get(self) -> Tensor:
        if self.x._version != self.version:
            raise RuntimeError(
                "a tensor that the gradients of a model's pass need was changed in its place: "
                f"{self.x.dtype} {tuple(self.x.shape)}"
            )
        return self.x


class _View(NamedTuple):
    of: _Output
    shape: torch.Size
    stride: Any
    offset: int


def _unpack(kept: _Kept | _View) -> Tensor:
    if isinstance(kept, _Kept):
        return kept.get()
    return kept.of.make().as_strided(kept.shape, kept.stride, kept.offset)

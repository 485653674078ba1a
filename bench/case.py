"""What is measured: an op at one size, what it costs at least, and what one would use instead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bench.timing import Call

Mode = Literal["fwd", "bwd", "both"]
Size = Literal["small", "medium", "large"]
MODES: tuple[Mode, ...] = ("fwd", "bwd", "both")
SIZES: tuple[Size, ...] = ("small", "medium", "large")

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Cost:
    """The least that an op must do: bytes from and to memory, floating-point operations."""

    read: float
    written: float
    flops: float


@dataclass(frozen=True)
class Case:
    """One op at one size on one kind of device.

    `ours(inputs, impl=…)` and each of `alternatives` return the same outputs. `trained` names the
    inputs that get a gradient; `upstream` the inputs that hold the gradients of the outputs (one
    name each; without, the first output is a loss). `chunk` is how many rows at a time the exact
    result is made of, where rows do not depend on each other and all at once would not fit; inputs
    that are `shared` belong to all rows, so their gradients add up, as do outputs of one number.
    `least(inputs, mode)` does what must be done at the least, where that is not bytes moved. `kept`
    is how many bytes of the memory hold the gradients as they are summed: the rest is extra.
    `changed` names inputs that are worked on in place, and returned.
    """

    op: str
    size: Size
    shape: str
    dtype: torch.dtype
    device: str
    inputs: Callable[[torch.device], Inputs]
    ours: Callable[..., Outputs]
    alternatives: Mapping[str, Run]
    costs: Mapping[Mode, Cost]
    variant: str = ""  # what sets it apart from the op's other cases, such as "entropy"
    trained: Sequence[str] = ()
    upstream: Sequence[str] = field(default=())
    chunk: int | None = None
    shared: Sequence[str] = ()
    least: Callable[[Inputs, Mode], list[Call]] | None = None
    kept: Mapping[Mode, int] = field(default_factory=dict)
    changed: Sequence[str] = ()

    @property
    def name(self) -> str:
        return f"{self.op}, {self.variant}" if self.variant else self.op

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype_name}"


def compiled(run: Callable[..., Outputs]) -> Run:
    """`run` under torch.compile, compiled at its first call."""
    # Timing a backward pass alone needs the graph again and again.
    torch._functorch.config.donated_buffer = False
    return torch.compile(run, dynamic=False)


def with_gradients(case: Case, inputs: Inputs, run: Run) -> tuple[Outputs, Outputs]:
    """Outputs of `run`, and the gradients of the trained inputs."""
    leaves = leaves_of(case, inputs)
    outputs = run(leaves)
    return outputs, gradients(case, outputs, leaves)


def fresh(case: Case, inputs: Inputs) -> Inputs:
    """The same inputs, with copies of those that are changed, and of the views of these."""
    changed = {_storage(x) for name, x in inputs.items() if name in case.changed}
    return inputs | copy.deepcopy({n: x for n, x in inputs.items() if _storage(x) in changed})


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def leaves_of(case: Case, inputs: Inputs) -> Inputs:
    """The same inputs, those that are trained as leaves of a new graph."""
    return {
        name: x.detach().requires_grad_() if name in case.trained else x
        for name, x in inputs.items()
    }


def gradients(case: Case, outputs: Outputs, leaves: Inputs, *, retain: bool = False) -> Outputs:
    trained = [leaves[name] for name in case.trained]
    if not case.upstream:  # a loss
        return torch.autograd.grad(outputs[:1], trained, retain_graph=retain)
    roots = outputs[: len(case.upstream)]
    incoming = [
        leaves[name].to(root.dtype) for name, root in zip(case.upstream, roots, strict=True)
    ]
    return torch.autograd.grad(roots, trained, incoming, retain_graph=retain)


def ragged_mask(rows: int, length: int, device: torch.device) -> Tensor:
    """Right-padded responses of half the length to all of it, as a rollout has them: [B, T]."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    return (torch.arange(length) < lengths).to(device)


def normal(
    *shape: int, device: torch.device, dtype: torch.dtype, seed: int, scale: float = 1.0
) -> Tensor:
    """Repeatable normal numbers; made on the device, in `dtype`."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, dtype=dtype, generator=generator) * scale

"""Runs one case and judges it: results, memory, threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import ops
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_kernels
from fuzz.bounds import tolerances
from fuzz.cases import Case
from fuzz.draw import CANARY
from ppo_kernels import reference

Named = dict[str, Tensor]
Op = Callable[..., Any]

THREADS = (1, 2, 3)
_MARGIN = 256  # bytes on either side of an output; a multiple of the alignment of torch's memory
_UNFILLED = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)


class Failure(AssertionError):
    """A case that an op does not pass."""


class Guard(TorchDispatchMode):
    """Memory that an op asks for is full of canaries, within and on either side.

    What a kernel leaves out stays NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return self.guarded(result) if func in _UNFILLED else result

    def guarded(self, x: Tensor) -> Tensor:
        count = x.untyped_storage().nbytes() + 2 * _MARGIN
        self.buffers.append(torch.full((count,), CANARY, dtype=torch.uint8))
        return torch.empty(0, dtype=x.dtype).set_(
            self.buffers[-1].untyped_storage(), _MARGIN // x.element_size(), x.shape, x.stride()
        )

    def check(self) -> None:
        for buffer in self.buffers:
            for side, margin in (("before", buffer[:_MARGIN]), ("after", buffer[-_MARGIN:])):
                if not (margin == CANARY).all():
                    at = int((margin != CANARY).int().argmax())
                    at = at - _MARGIN if side == "before" else at
                    size = len(buffer) - 2 * _MARGIN
                    raise Failure(f"memory {side} an output of {size} bytes written, byte {at}")


def kernel(op: str) -> Op:
    """The compiled op."""
    return partial(getattr(ppo_kernels, op), impl="cpp")


def check(case: Case, run: Op | None = None, guarded: bool = True) -> None:
    """Raise `Failure` where `run` (by default the compiled op) does not do what the op means.

    Without canaries around the outputs where not `guarded`.
    """
    run = run or kernel(case.op)
    memory = {name: _bytes(x) for name, x in case.arguments.items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in memory.items()}
    results = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        guard = Guard()
        try:
            with guard if guarded else nullcontext():
                results[threads] = _run(run, case)
        except Exception as error:
            raise Failure(f"raised {type(error).__name__}: {error}") from error
        guard.check()
        for name, x in memory.items():
            if not torch.equal(x, before[name]):
                at = int((x != before[name]).int().argmax())
                raise Failure(f"{name}, or memory around it, written: byte {at} of its buffer")
    torch.set_num_threads(1)
    _compare(case, results[1])
    for threads in THREADS[1:]:
        for name, x in results[threads].items():
            if not _same_bits(x, results[1][name]):
                raise Failure(f"{name}: not the same bits on 1 and {threads} threads")


def reproduction(case: Case) -> str:
    """A command, from the root of the repository, that runs the case again."""
    isa = os.environ.get("PPO_KERNELS_ISA")
    chosen = f"PPO_KERNELS_ISA={isa} " if isa else ""
    return f"{chosen}PYTHONPATH=tests python -m fuzz {case.op} {case.seed}"


def _run(op: Op, case: Case) -> Named:
    return ops.run(op, case.arguments, case.wrt, case.upstream)


def _compare(case: Case, actual: Named) -> None:
    """The error rule of `ops`, with the bounds of this case."""
    plain = getattr(reference, case.op)
    double = ops.in_dtype(case.arguments, torch.float64)
    in_double = Case(case.op, case.seed, double, case.wrt)
    naive, exact = _run(plain, case), _run(plain, in_double)
    if actual.keys() != naive.keys():
        raise Failure(f"results are {', '.join(actual)}, but should be {', '.join(naive)}")
    dtype = next(iter(naive.values())).dtype
    upstream = {name: g for name, x in exact.items() if (g := case.upstream(name, x)) is not None}
    allowed = tolerances(case.op, dtype, double, exact, upstream)
    for name, x in actual.items():
        of = naive[name]
        if (x.dtype, x.shape) != (of.dtype, of.shape):
            raise Failure(
                f"{name} is {x.dtype} {tuple(x.shape)}, but should be {of.dtype} {tuple(of.shape)}"
            )
        # Where two float32 are rounded apart, to a half, the errors differ by twice as much.
        slack = allowed[name] * (1 if x.dtype == dtype else 2)
        _judge(name, x.double(), of.double(), exact[name], slack)


def _judge(name: str, actual: Tensor, naive: Tensor, exact: Tensor, allowed: Tensor) -> None:
    error = (actual - exact).abs()
    allowed = (naive - exact).abs() + allowed
    # Plain PyTorch in the same dtype may overflow where the kernel does not.
    good = (error <= allowed) | (exact.isfinite() & naive.isinf() & ~actual.isnan())
    good = torch.where(exact.isfinite(), good, (actual == exact) | (actual.isnan() & exact.isnan()))
    if good.all():
        return
    excess = torch.where(good, -torch.inf, (error - allowed).nan_to_num(torch.inf))
    worst = int(excess.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)]
    raise Failure(
        f"{name}: {int((~good).sum())} of {exact.numel()} elements err too much; at {place} "
        f"kernel {actual.flatten()[worst]:.9g}, plain PyTorch {naive.flatten()[worst]:.9g}, "
        f"float64 {exact.flatten()[worst]:.9g}, error {error.flatten()[worst]:.3g} where "
        f"{allowed.flatten()[worst]:.3g} is allowed"
    )


def _bytes(x: Tensor) -> Tensor:
    """All memory of the buffer that `x` lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN; 0 does not equal -0."""
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(
        a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()
    )

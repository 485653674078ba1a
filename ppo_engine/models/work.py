"""What models do in a phase of a step, counted where they do it, and the time that it takes.

Nothing is counted or timed but inside `counting`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ppo_engine.models.flop import Costs, Span


@dataclass
class Work:
    """Of the passes of all models in a phase, on one device."""

    device: torch.device
    flop: float = 0.0  # of matrix products (`models.flop`)
    read: int = 0  # tokens, padding included
    padding: int = 0
    _passes: list[tuple[Any, Any]] = field(default_factory=list)  # begin and end of each

    def add(
        self,
        costs: Costs,
        spans: Sequence[Span],
        states: int,
        *,
        read: int,
        gradients: bool = False,
        layers: float = 1.0,
    ) -> None:
        """A pass as `Costs.flop` takes it, which reads so many tokens, padding included."""
        self.flop += costs.flop(spans, states, gradients=gradients, layers=layers)
        self.read += read
        self.padding += read - sum(span.new for span in spans)

    @contextmanager
    def timed(self) -> Iterator[None]:
        begin = self._now()
        try:
            yield
        finally:
            self._passes.append((begin, self._now()))

    def __add__(self, other: Work) -> Work:
        return Work(
            self.device,
            self.flop + other.flop,
            self.read + other.read,
            self.padding + other.padding,
            self._passes + other._passes,
        )

    @property
    def seconds(self) -> float:
        """Of the passes. On a GPU that of the stream, which has to be done with them."""
        if self.device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in self._passes) / 1000
        return float(sum(end - begin for begin, end in self._passes))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()  # nothing waits for it
        return event


_current: Work | None = None


@contextmanager
def counting(work: Work | None) -> Iterator[None]:
    """Add to `work` what models do in the block; None where that is not of a step, as in probes."""
    global _current
    before, _current = _current, work
    try:
        yield
    finally:
        _current = before


@contextmanager
def needed() -> Iterator[None]:
    """Count nothing of the block where it fails, as it is to be done again; its time stays."""
    work = _current
    before = None if work is None else (work.flop, work.read, work.padding)
    try:
        yield
    except BaseException:
        if work is not None and before is not None:
            work.flop, work.read, work.padding = before
        raise


def current_work() -> Work | None:
    """What is counted into, where something is."""
    return _current


@contextmanager
def passing() -> Iterator[None]:
    """Time the block, or the decorated function, as a part of a model's pass: parts do not nest."""
    if _current is None:
        yield
    else:
        with _current.timed():
            yield

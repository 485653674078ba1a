"""Steps that are launched as one: a CUDA graph for each kind of step.

A step of a small model is about a thousand kernels of a few microseconds, and the host takes longer
to launch them than the GPU to run them. A graph is launched once. It reads and writes the same
addresses each time: weights that change in place are seen, weights that move are not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], None]

_WARM_UP = 2  # runs before a capture, in which kernels are compiled and workspaces made


class Graphs:
    """Graphs of steps, by what tells the steps apart; all share one pool of memory."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Step] = {}
        self._pool: Any = None

    def step(self, key: Hashable, step: Step, changes: Sequence[Tensor]) -> Step:
        """The graph of `step`, captured where `key` is new; `step` advances the tensors `changes`,
        which are as before after that. What else it writes, it writes again when it is run."""
        if key not in self._found:
            before = [x.clone() for x in changes]
            self._found[key] = self.capture(step)
            for x, old in zip(changes, before, strict=True):
                x.copy_(old)
        return self._found[key]

    def clear(self) -> None:
        """Forget all graphs, as what they read has moved."""
        self._found.clear()
        self._pool = None  # it is gone with the last graph that was in it

    def capture(self, step: Step) -> Step:
        """What does the same as `step`, as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # what is collected during a capture would break it
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        replay: Step = graph.replay
        return replay

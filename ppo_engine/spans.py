"""Names in a profiler's trace for what runs; they know nothing of what they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

PREFIX = "ppo."  # of span names in a trace, which has those of other libraries too


@contextmanager
def span(name: str) -> Iterator[None]:
    """Name what runs in the block, or in the decorated function, in a profiler's trace."""
    if torch.autograd.profiler._is_profiler_enabled:
        with record_function(PREFIX + name):
            yield
    else:
        yield

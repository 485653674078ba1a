"""Names for what runs, in the trace of a profile; they know nothing of what they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

PREFIX = "ppo."  # of span names in a trace, which holds other people's too


@contextmanager
def span(name: str) -> Iterator[None]:
    """Name what runs in the block, or in the function decorated with it, in a profile's trace."""
    if torch.autograd.profiler._is_profiler_enabled:
        with record_function(PREFIX + name):
            yield
    else:
        yield

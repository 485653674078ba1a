"""How fast the machine multiplies matrices, measured where it is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch

from ppo_kernels import onednn

_REPEATS, _SECONDS = 15, 0.2  # of each call; the second cuts the first short
_SIZE = {"cpu": 1024, "cuda": 8192}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square product in `dtype`, far larger than what a call costs, by the faster
    library: the best of some."""
    n = _SIZE[device.type]
    # Its own generator: a run draws the same numbers whether it is measured or not. Random, as on a
    # GPU numbers that are all the same take less power.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(n, n, device=device, generator=generator).to(dtype)
    seconds = best_seconds(device, partial(torch.matmul, a, a))
    if device.type == "cpu" and dtype == torch.float32 and onednn.is_faster():
        seconds = min(seconds, best_seconds(device, partial(onednn.product, a, a)))
    return 2 * n**3 / seconds


def best_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """The best of some calls. Some dtypes are so slow on some CPUs that one call must do."""
    best, spent = math.inf, 0.0
    for _ in range(_REPEATS):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
        if spent > _SECONDS:
            break
    return best


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

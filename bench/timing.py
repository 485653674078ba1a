"""How long calls take, several of them in turn, and how much memory they need on top."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# Before torch: its profiler announces each start and stop on the terminal otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

Call = Callable[[], object]

_SAMPLE_SECONDS = 1e-3  # shorter calls are repeated within a sample, against the clock's own cost
_LEAST_SAMPLES, _MOST_SAMPLES = 3, 200


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: quantiles over the samples."""

    p20: float
    p50: float
    p80: float


def time_in_turn(
    device: torch.device, calls: Mapping[str, Sequence[Call]], seconds: float
) -> dict[str, Timing]:
    """Time each variant, about `seconds` of each, one sample of every variant in each round.

    What disturbs the machine for a while so disturbs all alike. A variant is a list of the same
    call on copies of its inputs, rotated through: on a GPU they outgrow the cache together.
    """
    sample = _cuda_sample if device.type == "cuda" else _cpu_sample
    rotations = {name: _rotate(variant) for name, variant in calls.items()}
    repeats, wanted = {}, {}
    for name, rotation in rotations.items():
        sample(rotation, 1)
        once = min(sample(rotation, 1) for _ in range(2))
        repeats[name] = max(1, math.ceil(_SAMPLE_SECONDS / once))
        wanted[name] = seconds / (repeats[name] * once)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(_MOST_SAMPLES):
            due = [n for n in calls if turn < max(_LEAST_SAMPLES, wanted[n])]
            if not due:
                break
            for name in due:
                samples[name].append(sample(rotations[name], repeats[name]) / repeats[name])
    finally:
        gc.enable()
    return {name: _timing(found) for name, found in samples.items()}


def peak_extra_bytes(device: torch.device, call: Call) -> int:
    """The most memory that torch had allocated during the call on top of what it had before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda e: int(e.start_ns())
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _rotate(calls: Sequence[Call]) -> Iterator[Call]:
    while True:
        yield from calls


def _cpu_sample(rotation: Iterator[Call], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        next(rotation)()
    return time.perf_counter() - started


def _cuda_sample(rotation: Iterator[Call], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        next(rotation)()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _timing(samples: list[float]) -> Timing:
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(tenths[1], statistics.median(samples), tenths[7])

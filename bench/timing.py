"""How long calls take, several of them in turn, and how much memory they need on top."""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Before torch: its profiler announces each start and stop on the terminal otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

Call = Callable[[], object]

_SAMPLE_SECONDS = 1e-3  # shorter calls are repeated within a sample, against the clock's own cost
_LEAST_SAMPLES, _MOST_SAMPLES = 3, 200
_CAPTURED = 100  # calls in a CUDA graph, at most


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: quantiles over the samples."""

    p20: float
    p50: float
    p80: float


def time_in_turn(
    device: torch.device,
    calls: Mapping[str, Sequence[Call]],
    seconds: float,
    *,
    replayed: bool = False,
) -> dict[str, Timing]:
    """Time each variant, about `seconds` of each, one sample of every variant in each round.

    What disturbs the machine for a while so disturbs all alike. A variant is a list of the same
    call on copies of its inputs, rotated through: on a GPU they outgrow the cache together. With
    `replayed`, on a GPU, they are replayed from a CUDA graph where they can be: what the kernels
    take, without what the host takes to launch them.
    """
    sample = _cuda_sample if device.type == "cuda" else _cpu_sample
    counts = dict.fromkeys(calls, 1)  # of calls in one of what is repeated
    rotations = {name: _rotate(variant) for name, variant in calls.items()}
    pool = torch.cuda.graph_pool_handle() if replayed else None
    repeats, wanted = {}, {}
    for name, rotation in rotations.items():
        sample(rotation, 1)
        if replayed and not waits_for_the_device(calls[name][0]):
            once = sample(rotation, 1)
            counts[name] = max(len(calls[name]), min(math.ceil(_SAMPLE_SECONDS / once), _CAPTURED))
            rotation = rotations[name] = _rotate([_captured(rotation, counts[name], pool)])
            sample(rotation, 1)
        once = min(sample(rotation, 1) for _ in range(2))
        repeats[name] = max(1, math.ceil(_SAMPLE_SECONDS / once))
        wanted[name] = seconds / (repeats[name] * once)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)  # what ran before, its copies of the same inputs too, is in the cache
    gc.collect()
    gc.disable()
    try:
        for turn in range(_MOST_SAMPLES):
            due = [n for n in calls if turn < max(_LEAST_SAMPLES, wanted[n])]
            if not due:
                break
            order.shuffle(due)
            for name in due:
                taken = sample(rotations[name], repeats[name])
                samples[name].append(taken / repeats[name] / counts[name])
    finally:
        gc.enable()
    return {name: _timing(found) for name, found in samples.items()}


def waits_for_the_device(call: Call) -> bool:
    """Whether the call, warmed up before, makes the host wait for the GPU: a CUDA graph cannot."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


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


def _captured(rotation: Iterator[Call], count: int, pool: Any) -> Call:
    """So many calls as one CUDA graph. Graphs of one pool reuse each other's memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        for _ in range(count):
            next(rotation)()
    return graph.replay


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

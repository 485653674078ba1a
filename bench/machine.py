"""The machine's own rates, measured in the run that quotes them; and what machine it is."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.timing import Call
from ppo_engine.errors import UserError
from ppo_engine.models.rates import best_seconds, matrix_rate, wait
from ppo_kernels.head import multiplies

_ROOT = Path(__file__).resolve().parents[1]
_REPEATS = 15
# Far larger than any cache, and on a GPU also long beside the launch.
_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
_CALL_SHAPE = (8, 64)


@dataclass(frozen=True)
class Ceilings:
    """The best of some repetitions: bandwidths in bytes/s, rates in FLOP/s, `call` in seconds.

    `copy` counts the bytes read and those written. `call` is one eager `torch.add` of 8x64
    tensors, as the host sees it.
    """

    read: float
    write: float
    copy: float
    matmul: dict[torch.dtype, float]
    call: float


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype]) -> Ceilings:
    """Bandwidths from fp32 buffers, matrix rates in each of `dtypes`."""
    numbers = _BYTES[device.type] // 4
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    size = numbers * 4
    # Which reduction is quickest differs between machines.
    read = min(best_seconds(device, source.sum), best_seconds(device, source.amax))
    write = best_seconds(device, lambda: target.fill_(1.0))
    copy = best_seconds(device, lambda: target.copy_(source))
    matmul = {dtype: matrix_rate(device, dtype) for dtype in dtypes}
    return Ceilings(size / read, size / write, 2 * size / copy, matmul, _call_seconds(device))


def least_traffic(device: torch.device, read: float, written: float) -> list[Call]:
    """Ways to move so many bytes of memory and do no more. On a CPU, copy what is written and read
    the rest (which reduction reads quickest differs between machines); on a GPU, copy half of all,
    by the driver or by a kernel: there, reads and writes cost the same."""
    if device.type == "cuda":
        x = torch.ones(round((read + written) / 8), device=device)
        y = torch.empty_like(x)
        return [partial(y.copy_, x), partial(torch.neg, x, out=y)]

    def passes(size: float, way: Callable[[Tensor], Call]) -> list[Call]:
        parts = math.ceil(size / _BYTES[device.type])
        return [way(torch.ones(round(size / parts / 4), device=device))] * parts if parts else []

    copies = passes(written, lambda x: partial(torch.empty_like(x).copy_, x))
    only_read = max(0.0, read - written)
    return [
        partial(_each, [*copies, *passes(only_read, way)])
        for way in (lambda x: x.sum, lambda x: x.amax)
    ]


def least_call(device: torch.device) -> Call:
    """One eager op on small tensors: the least that any op costs."""
    x = torch.ones(_CALL_SHAPE, device=device)
    return partial(torch.add, x, x)


def _each(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _call_seconds(device: torch.device) -> float:
    call = least_call(device)
    best = math.inf
    for _ in range(_REPEATS):
        wait(device)
        started = time.perf_counter()
        for _ in range(500):
            call()
        best = min(best, (time.perf_counter() - started) / 500)
    return best


def describe(device: torch.device) -> str:
    """In words, such as 'AMD EPYC 9R14, 2 cores, AVX512, bf16': bf16 where the machine multiplies
    bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    native = ", bf16" if multiplies(torch.bfloat16, device) else ""
    return f"{_processor()}, {os.cpu_count()} cores, {capability}{native}"


def slug(device: torch.device) -> str:
    """`describe` as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", describe(device).lower()).strip("-")


def versions() -> dict[str, str]:
    """Of what the speeds depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}


def asked(name: str) -> torch.device:
    """The device of a benchmark's `--device`; a UserError where it is not there."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use, and there is none.")
    return device


def about(device: torch.device) -> dict[str, Any]:
    """Columns that say where engine and models were measured, and with what."""
    return {
        "device": describe(device),
        "threads": torch.get_num_threads(),
        **versions(),
        "transformers": importlib.metadata.version("transformers"),
        "commit": commit(),
    }


def commit() -> str:
    """The commit that is measured, with '+' where the files differ from it; '' outside Git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return re.sub(r"\s+\d+-Core Processor|\(R\)|\(TM\)", "", names[0]) if names else "CPU"

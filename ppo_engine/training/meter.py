"""What the phases of a step achieve, as metrics.

Of each phase in which a model reads something, and of the whole `step`:

mfu/…       model FLOP utilization: the FLOP of matrix products that it needs (`models.flop`) over
            its time, as a share of the rate at which this machine multiplies two large matrices in
            the compute dtype, measured once (`models.rates`): CPUs have no peak that can be known
padding/…   the share of the tokens that models read which is padding, or of rows that are done
            while others still write
overhead/…  the share of its time outside the passes of models: tokenizing, planning, advantages,
            optimizer, a reward function. What losses, log-probs and sampling take beside the
            products is inside; a profile (`training.anatomy`) tells these apart

Of each phase, `memory/…`: the most memory in use within it, where the system tells (`memory`); and
`tokens_per_second/…`: the tokens that the policy wrote in this step (in supervised training, that
the model reads) by the phase's time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ppo_engine.memory import begin_peak, peak_since_begun
from ppo_engine.models import rates
from ppo_engine.models.work import Work, counting

_rate = cache(rates.matrix_rate)  # of this process


class Meter:
    """Of the phases of one step after the other, on `device`, in the compute `dtype`."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._rate = _rate(device, dtype)
        self._phases: dict[str, tuple[Work, float]] = {}
        self._peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what models do in the block; ends when the device has done it."""
        peaks = begin_peak(self._device)
        work, started = Work(self._device), time.perf_counter()
        with counting(work):
            yield
            rates.wait(self._device)
        self._phases[name] = work, time.perf_counter() - started
        if peaks:
            self._peaks[f"memory/{name}"] = peak_since_begun(self._device)

    def metrics(self, tokens: int, seconds: float) -> dict[str, float]:
        """Of the phases since the last call, and of the step with so many `tokens` of the policy's
        that took so many `seconds`."""
        phases, self._phases = self._phases, {}
        found, self._peaks = self._peaks, {}
        found |= {f"tokens_per_second/{name}": tokens / took for name, (_, took) in phases.items()}
        whole = sum((work for work, _ in phases.values()), Work(self._device))
        for name, (work, took) in {**phases, "step": (whole, seconds)}.items():
            if work.read:
                found[f"mfu/{name}"] = work.flop / (took * self._rate)
                found[f"padding/{name}"] = work.padding / work.read
                found[f"overhead/{name}"] = 1 - work.seconds / took
        return found

"""What the process is said to have taken, and within what."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from ppo_engine import memory
from ppo_engine.training.meter import Meter

CPU = torch.device("cpu")
MIB = 2**-10
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lowers a process's peak")


def use(mib: int) -> None:
    """So much for a moment. Not by malloc, which keeps what is freed once a command has run."""
    with mmap.mmap(-1, mib << 20) as block:
        for place in range(0, len(block), mmap.PAGESIZE):
            block[place] = 1


@linux
def test_a_peak_begins_anew_and_the_peak_of_all_times_stays() -> None:
    use(512)
    before = memory.peak_memory(CPU)
    assert memory.begin_peak(CPU)
    low = memory.peak_since_begun(CPU)
    assert low < before - 400 * MIB
    use(256)
    assert low + 200 * MIB < memory.peak_since_begun(CPU) < before
    assert memory.peak_memory(CPU) == pytest.approx(before, abs=MIB)
    assert memory.begin_peak(CPU)  # the one before the last counts too
    assert memory.peak_memory(CPU) == pytest.approx(before, abs=MIB)


@linux
def test_each_phase_has_its_own_peak() -> None:
    meter = Meter(CPU, torch.float32)
    for name, mib in {"generate": 512, "update": 128}.items():
        with meter.phase(name):
            use(mib)
    found = meter.metrics(1, 1.0)
    assert found["memory/generate"] - found["memory/update"] == pytest.approx(
        384 * MIB, abs=64 * MIB
    )
    assert not any(name.startswith("memory/") for name in meter.metrics(1, 1.0))


def test_where_no_peak_begins_anew_none_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    meter = Meter(CPU, torch.float32)
    with meter.phase("update"):
        pass
    assert "memory/update" not in meter.metrics(1, 1.0)
    assert memory.peak_memory(CPU) > 0

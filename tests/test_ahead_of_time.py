"""Every Triton kernel compiles for GPUs that are not here, spills nothing and fits; what it takes
is what the committed table says."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
TABLE = SCRIPT.with_suffix(".csv")
MOST_SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of a block
KEY = ("kernel", "configuration", "target")
TAKES = ("registers", "spilled", "shared")

Rows = dict[tuple[str, ...], dict[str, int]]


def read(text: str) -> tuple[str, Rows]:
    """The version of triton, and the table."""
    version, _, table = text.partition("\n")
    rows = csv.DictReader(table.splitlines())
    return version, {
        tuple(row[name] for name in KEY): {name: int(row[name]) for name in TAKES} for row in rows
    }


@pytest.fixture(scope="module")
def compiled() -> tuple[str, Rows]:
    """Made in a process without the interpreter, which would keep triton from compiling."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return read(result.stdout)


@pytest.mark.slow
def test_nothing_is_spilled_and_all_fits(compiled: tuple[str, Rows]) -> None:
    version, rows = compiled
    if version != read(TABLE.read_text())[0]:
        pytest.skip(f"the blocks are sized for another version; here {version}")
    assert {target for _, _, target in rows} == set(MOST_SHARED)
    for (kernel, configuration, target), takes in rows.items():
        assert takes["spilled"] == 0, (kernel, configuration, target)
        assert takes["shared"] <= MOST_SHARED[target] * 1024, (kernel, configuration, target)


@pytest.mark.slow
def test_the_committed_table_is_up_to_date(compiled: tuple[str, Rows]) -> None:
    version, committed = read(TABLE.read_text())
    again = "python tests/ahead_of_time.py --write"
    assert compiled[1].keys() == committed.keys(), f"what is launched has changed: {again}"
    if version != compiled[0]:
        pytest.skip(f"the committed table is of another version: {version}, here {compiled[0]}")
    assert compiled[1] == committed, f"what kernels take has changed: {again}"


def test_every_kernel_is_launched() -> None:
    """None is left out of the table."""
    folder = SCRIPT.parents[1] / "kernels" / "ppo_kernels" / "triton"
    launched = {kernel for kernel, _, _ in read(TABLE.read_text())[1]}
    for file in folder.glob("*.py"):
        text = file.read_text()
        for part in text.split("@triton.jit(")[1:]:  # what is launched names its sizes
            name = part.partition("def ")[2].partition("(")[0]
            assert name in launched, f"{file.name}: {name}"

"""Runs that come out the same to the last bit: with any number of threads, and as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import pytest

TESTS = Path(golden.__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What the golden runs give, by the threads that the machine offers them."""
    folder = tmp_path_factory.mktemp("golden")
    running = {}
    for threads in (1, 2):
        offered = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        running[threads] = subprocess.Popen(
            [sys.executable, "-m", "golden", str(folder / f"{threads}.json")],
            cwd=TESTS,
            env=os.environ | offered,
            stderr=subprocess.PIPE,
            text=True,
        )
    for process in running.values():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return {threads: json.loads((folder / f"{threads}.json").read_text()) for threads in running}


def test_any_number_of_threads_gives_the_same_bits(found: dict[int, Any]) -> None:
    assert [len(rows) for rows in found[1].values()] == [golden.STEPS + 2] * 4
    assert found[1] == found[2]


def test_runs_are_what_they_were(found: dict[int, Any]) -> None:
    file = golden.record_of_this_machine()
    if not file.exists():
        pytest.skip(f"no record for this CPU and torch; `make golden` writes {file.name}")
    different = list(golden.differences(json.loads(file.read_text()), found[1]))
    told = "\n".join(different[:10])
    assert not different, (
        f"{len(different)} numbers are not those of {file.name}; where that is meant, "
        f"`make golden` writes them anew:\n{told}"
    )


def test_what_a_difference_is() -> None:
    record = {"ppo": [{"step": 1, "a": 0.1, "b": None}, {"weights": "x"}]}
    more = {"ppo": [{"step": 1, "a": 0.1, "b": None, "new": 1.0}, {"weights": "x"}]}
    assert list(golden.differences(record, more)) == []
    other = {"ppo": [{"step": 1, "a": 0.1 + 2**-56, "b": 0.0}, {"weights": "x"}]}
    assert list(golden.differences(record, other)) == [
        "ppo, step 1: a is 0.10000000000000002, and was 0.1",
        "ppo, step 1: b is 0.0, and was None",
    ]
    [told] = golden.differences(record, {"ppo": record["ppo"][:1]})
    assert told == "ppo, step after the last: weights is None, and was 'x'"

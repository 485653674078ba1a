"""examples/arithmetic: nothing held out is trained on, and all of it runs."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "examples" / "arithmetic"


@pytest.fixture
def script(monkeypatch):
    """The names that a script of the example defines."""
    monkeypatch.syspath_prepend(HERE)
    return lambda name: runpy.run_path(str(HERE / name))


def test_no_held_out_sum_is_trained_on_in_any_order(script, tmp_path):
    files = script("make_data.py")["make_data"](tmp_path)
    pairs = []
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        words = [row["prompt"][0]["content"].rstrip("?").split() for row in rows]
        sums = [(int(a), int(b)) for _, _, a, _, b in words]
        assert [str(a + b) for a, b in sums] == [row["answer"] for row in rows]
        assert len(set(sums)) == len(sums)
        pairs.append({frozenset(numbers) for numbers in sums})
    training, held_out = pairs
    assert not training & held_out
    assert len(training) == 110 and len(held_out) == 100 == len(files[1].read_text().splitlines())


def test_table_counts_standard_errors_of_the_difference(script):
    runs = {3: [(0, 0.1, 0.03), (2, 0.9, 0.5), (4, 0.3, 0.04)], 5: [(0, 0.1, 0.03), (4, 0.2, 0.04)]}
    lines = script("run.py")["table"](runs).splitlines()
    assert lines[2:4] == [
        "| 3 | 10% ± 3% | 30% ± 4% | 4.0 |",
        "| 5 | 10% ± 3% | 20% ± 4% | 2.0 |",
    ]
    assert lines[-1] == "1 of 2 rose by more than 3 standard errors."


@pytest.mark.slow
def test_smoke_run_makes_data_trains_and_prints_the_table(tmp_path):
    page = (HERE / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, str(HERE / "run.py"), "--smoke", "--seeds", "4"]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "| 4 | 0% ± 0% | 0% ± 0% | 0.0 |" in out
    folder = tmp_path / "runs" / "arithmetic-smoke"  # the real run would take it for its own
    rows = [json.loads(x) for x in (folder / "seed-4" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/scores" in row] == [0, 1]
    assert "eval/scores" in rows[0] and len(rows) == 2
    samples = (folder / "seed-4" / "samples.jsonl").read_text().splitlines()
    assert sum(json.loads(row).get("held_out", False) for row in samples) == 200
    assert (HERE / "README.md").read_text(encoding="utf-8") == page
    shutil.rmtree(folder / "seed-4" / "policy")  # as if it had been interrupted before its end
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "run.resume=true" in again and again.splitlines()[-4:] == out.splitlines()[-4:]
    (folder / "seed-4" / "config.yaml").unlink()
    shutil.rmtree(folder / "seed-4" / "policy")
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "is not empty" in failed.stderr and "Traceback" not in failed.stderr

"""The two sides of a step: their processes in turn, and what those report."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import table
from bench.e2e_worker import PHASES, Work, read_report
from bench.results import Row
from ppo_engine.errors import UserError

# Of a worker: nothing is downloaded, and libraries print little.
WORKER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_LINES_SHOWN = 15  # of what a process that failed had printed last


@dataclass
class Side:
    """What one side's processes have reported; `skipped` says why there is nothing."""

    name: str
    script: str = ""  # in this folder, or its path
    python: str = sys.executable  # of the environment that has what the side is
    versions: Mapping[str, str] = field(default_factory=dict)  # of what is in that environment
    steps: list[dict[str, Any]] = field(default_factory=list)  # without warm-up
    skipped: str = ""
    failed: bool = False

    def seconds(self, phase: str) -> list[float]:
        """Of a phase, or of the whole `step`, in every measured step."""
        if phase == "step":
            return [sum(step["seconds"].values()) for step in self.steps]
        return [step["seconds"][phase] for step in self.steps]

    def median(self, phase: str) -> float:
        return statistics.median(self.seconds(phase))

    @property
    def peak_bytes(self) -> int:
        return max(step["peak_bytes"] for step in self.steps)

    @property
    def others(self) -> float:
        """The largest share of the machine's CPU time that other processes took in a step."""
        return max(step["others"] for step in self.steps)


class WorkerFailed(Exception):
    """A process ended before its work was done; the text is what it had printed last."""


def compare(work: Work, sides: Sequence[Side], repeats: int) -> None:
    """Run the sides in turn, each time in a new process; fills `sides`.

    A side whose process fails is dropped with its results, and the other one continues.
    """
    work.save()
    for repeat in range(1, repeats + 1):
        for side in sides:
            if side.skipped:
                continue
            try:
                with table.waiting(f"{side.name}, process {repeat} of {repeats}"):
                    steps = _run(side, work)
            except WorkerFailed as failure:
                side.skipped, side.failed, side.steps = f"Its process failed:\n{failure}", True, []
                continue
            _check_same_work(side.name, steps, work)
            side.steps += steps


def _run(side: Side, work: Work) -> list[dict[str, Any]]:
    """The measured steps of one process, each printed as it ends."""
    steps: list[dict[str, Any]] = []
    for step in reports(side.script, work, python=side.python):
        parts = ", ".join(f"{phase} {step['seconds'][phase]:.2f}" for phase in PHASES)
        note = "" if steps else " (warm-up, not counted)"
        table.say(f"  {side.name:<5} {sum(step['seconds'].values()):8.2f} s: {parts}{note}")
        steps.append(step)
    return steps[1:]


def reports(script: str, work: Work, *, python: str = sys.executable) -> Iterator[dict[str, Any]]:
    """Start a process and yield each step that it reports; raises WorkerFailed."""
    environment = os.environ | WORKER_ENVIRONMENT
    if work.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        [python, str(Path(__file__).parent / script), work.folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None  # it is a pipe
    last: deque[str] = deque(maxlen=_LINES_SHOWN)
    reported = 0
    try:
        for line in process.stdout:
            step = read_report(line)
            if step is not None:
                reported += 1
                yield step
            elif line.strip():
                last.append(line.rstrip())
        status = process.wait()
    finally:
        process.kill()  # does nothing once it has ended
        process.wait()
    if status or reported != work.steps:
        ended = f"exit status {status} after {reported} of {work.steps} steps"
        raise WorkerFailed("\n".join([*last, ended]))


def _check_same_work(side: str, steps: Sequence[dict[str, Any]], work: Work) -> None:
    expected = (work.group * sum(map(len, work.prompt_ids)), work.response_tokens)
    for step in steps:
        found = (step["prompt_tokens"], step["response_tokens"])
        if found != expected:
            raise UserError(
                f"{side} read {found[0]} and wrote {found[1]} tokens where {expected[0]} and "
                f"{expected[1]} were asked for: the sides did not do the same work, so there is "
                "nothing to compare."
            )


def rows(sides: Sequence[Side], floor: Mapping[str, float], work: Work, common: Row) -> list[Row]:
    """For the CSV: one for each side and phase, and for the whole step."""
    found: list[Row] = []
    for side in sides:
        for phase in (*PHASES, "step"):
            seconds = side.seconds(phase)
            whole = phase == "step"
            found.append(
                {
                    "side": side.name,
                    "phase": phase,
                    "seconds": side.median(phase),
                    "seconds_min": min(seconds),
                    "seconds_max": max(seconds),
                    "steps": len(seconds),
                    "floor_seconds": floor[phase],
                    # A reward function has none.
                    "x_floor": side.median(phase) / floor[phase] if floor[phase] else None,
                    "tokens_per_second": (
                        work.response_tokens / side.median(phase) if whole else None
                    ),
                    "peak_bytes": side.peak_bytes if whole else None,
                    "others": side.others if whole else None,
                    **side.versions,
                    **common,
                    "threads": side.steps[0]["threads"],
                }
            )
    return found

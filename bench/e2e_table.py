"""What a comparison of steps prints at the end: the figures, and what they compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from bench import table
from bench.e2e_compare import Side
from bench.e2e_worker import PHASES, Work

_console = Console(highlight=False)


def print_comparison(
    what: str, sides: Sequence[Side], floor: Mapping[str, float], work: Work
) -> None:
    """Seconds of each phase of ours and TRL's, their ratio, and each against the floor."""
    grid = Table(title=f"One {what} step, {work.dtype}: seconds, the median of {_counts(sides)}")
    grid.add_column("phase", no_wrap=True)
    for title in ("ours", "TRL", "TRL/ours", "floor", "ours/floor", "TRL/floor"):
        grid.add_column(title, justify="right")
    for phase in (*PHASES, "step"):
        seconds = [side.median(phase) if side.steps else None for side in sides]
        grid.add_row(
            phase,
            *(_number(x) for x in seconds),
            _ratio(seconds[1], seconds[0]),
            _number(floor[phase]),
            *(_ratio(x, floor[phase]) for x in seconds),
            style="bold" if phase == "step" else None,
            end_section=phase in (PHASES[-1], "step"),
        )
    speeds = [work.response_tokens / side.median("step") if side.steps else None for side in sides]
    grid.add_row("response tok/s", *(_number(x) for x in speeds))
    peaks = [side.peak_bytes / 1e9 if side.steps else None for side in sides]
    ratio = _ratio(peaks[1], peaks[0])
    grid.add_row("peak memory, GB", *(_number(x) for x in peaks), ratio)
    _console.print(grid)
    others = max(side.others for side in sides if side.steps)
    table.warn_if_busy(others, "a step")


def print_differences(
    same: Sequence[str], different: Sequence[tuple[str, str, str]], trl: str
) -> None:
    """What is the same on both sides and what is not; TRL's as that release's source has it."""
    one = Table(title="The same on both sides", show_header=False)
    for line in same:
        one.add_row(line)
    other = Table(title="Not the same")
    for title in ("", "ours", f"TRL {trl}"):
        other.add_column(title)
    for row in different:
        other.add_row(*row)
    _console.print(one)
    _console.print(other)


def _counts(sides: Sequence[Side]) -> str:
    counts = [f"{len(side.steps)} ({side.name})" for side in sides if side.steps]
    return " and ".join(counts) + " steps"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ratio(a: float | None, b: float | None) -> str:
    return "" if a is None or not b else f"{a / b:.2f}"

"""What the benchmarks print: lines as things are measured, and a warning where a machine was
busy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from bench.machine import Ceilings
from bench.results import Row

_QUIET = 0.1  # share of the machine that others may take before the times are doubted
_console = Console(highlight=False, soft_wrap=True)
_LINE = "{:<31} {:>6} {:>9} {:>17} {:>8} {:>8} {:>10} {:>9} {:>8}"


def say(text: str) -> None:
    _console.print(text, markup=False)


def waiting(what: str) -> AbstractContextManager[object]:
    """A line that says what is under way, in a terminal only."""
    return _console.status(what) if _console.is_terminal else nullcontext()


def warn_if_busy(others: float, of: str) -> None:
    """Say so where other processes took more than little of the machine while `of` was timed."""
    if others > _QUIET:
        say(
            f"Other processes took up to {others:.0%} of the machine's CPU time in {of}: these "
            "times are too long, and not equally on all sides. Measure again on an idle machine."
        )


def ceiling_columns(ceilings: Ceilings) -> dict[str, float]:
    """As columns of the CSV: bandwidths in GB/s, rates in TFLOP/s, a call in microseconds."""
    return {
        "read_gb_per_s": ceilings.read / 1e9,
        "write_gb_per_s": ceilings.write / 1e9,
        "copy_gb_per_s": ceilings.copy / 1e9,
        "call_us": ceilings.call * 1e6,
    } | {
        f"matmul_{str(dtype).removeprefix('torch.')}_tflop_per_s": rate / 1e12
        for dtype, rate in ceilings.matmul.items()
    }


def print_ceilings(ceilings: Ceilings) -> None:
    say(
        f"  read {ceilings.read / 1e9:.1f} GB/s, write {ceilings.write / 1e9:.1f} GB/s, copy "
        f"{ceilings.copy / 1e9:.1f} GB/s (read plus written), torch.add of 8x64 "
        f"{ceilings.call * 1e6:.1f} us"
    )
    for dtype, rate in ceilings.matmul.items():
        say(f"  matrix product, {str(dtype).removeprefix('torch.')}: {rate / 1e12:.3f} TFLOP/s")


def print_header() -> None:
    say(
        "floor: reading or copying the least bytes, in turn with the op, or the least FLOP at "
        "these rates,\nor one torch.add; x best: how many times faster than the best alternative; "
        "peak: memory on top\nof the inputs; error: beside float64. On a GPU: a copy of as many "
        "bytes for a floor; replays of CUDA\ngraphs, but of the smallest case, which shows what a "
        "call costs the host, and of what waits for the GPU\n"
    )
    titles = ("", "mode", "ms", "(p20 to p80)", "GB/s", "x floor", "x best alt", "peak MB", "error")
    _console.print(_LINE.format(*titles), style="bold", markup=False)


def print_rows(rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        if place == 0:
            title = f"{row['op']}  {row['shape']} {row['dtype']}, floor {row['floor_ms']:.4g} ms"
            _console.print(title, style="bold", markup=False)
        if row["ms_p50"] is None:
            say(f"  {row['impl']:<29} {row['mode']:>6}  no time: {row['status']}")
            continue
        best = row["x_best_alternative"]
        line = _LINE.format(
            f"  {row['impl']}",
            row["mode"],
            f"{row['ms_p50']:.4g}",
            f"({row['ms_p20']:.4g} to {row['ms_p80']:.4g})",
            f"{row['gb_per_s']:.1f}",
            f"{row['x_floor']:.2f}",
            "" if best is None else f"{best:.2f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['error']:.0e}",
        )
        _console.print(line, style=None if best is None else "cyan", markup=False)

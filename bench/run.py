"""Measure the ops: `python bench/run.py [ops…]`; see --help.

Every row is checked against float64 before it is timed; a wrong one gets no time.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import machine, table
from bench.case import MODES, SIZES, Case
from bench.measure import ALTERNATIVES, measure
from bench.registry import cases
from bench.results import Row, write_csv
from bench.targets import EXPLANATIONS, verdicts
from ppo_engine.memory import keep_freed_memory
from ppo_kernels.dispatch import IMPLS, OPS, accumulator


def main() -> int:
    options = _options()
    device = torch.device(options.device)
    if device.type == "cuda":  # CUDA graphs are never captured on the default stream
        torch.cuda.set_stream(torch.cuda.Stream())
    # Without, the time of large outputs is that of the page faults, ours and others' alike.
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = cases(device.type, options.ops, options.sizes)
    table.say(f"{machine.describe(device)}, {torch.get_num_threads()} threads; first its ceilings")
    dtypes = sorted({accumulator(case.dtype) for case in chosen}, key=str)  # what they compute in
    ceilings = machine.measure_ceilings(device, dtypes)
    table.print_ceilings(ceilings)
    table.print_header()
    rows: list[Row] = []
    wrong = 0
    for number, case in enumerate(chosen, 1):
        with table.waiting(f"{number}/{len(chosen)} {case}"):
            found = [row for rows in _rows(case, ceilings, options, device) for row in rows]
        wrong += sum(row["status"].startswith("wrong") for row in found)
        table.print_rows(found)
        rows += found
    lines = list(verdicts(rows, device.type))
    if lines:
        page = EXPLANATIONS[device.type]
        table.say("\n".join([f"\nTargets (those missed are explained in {page})", *lines]))
    common = {
        "device": machine.describe(device),
        "threads": torch.get_num_threads(),
        **machine.versions(),
        "commit": machine.commit(),
        **table.ceiling_columns(ceilings),
    }
    if options.out:
        command = shlex.join(["python", "bench/run.py", *sys.argv[1:]])
        write_csv(options.out, command, [row | common for row in rows])
        table.say(f"Rows are in {options.out}")
        if options.plot:
            from bench.plot import plot

            picture = Path(options.out).with_suffix(".png")
            plot(rows, machine.describe(device), picture)
            table.say(f"Curves are in {picture}")
    return 1 if wrong else 0


def _rows(
    case: Case, ceilings: machine.Ceilings, options: argparse.Namespace, device: torch.device
) -> Iterator[list[Row]]:
    return measure(
        case,
        ceilings,
        device=device,
        modes=[options.mode] if options.mode else MODES,
        impls=options.impl,
        seconds=options.seconds,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time the ops against the machine's floor and against what one would use "
        "instead. Exit status 1 where a result was wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, metavar="SIZE")
    parser.add_argument(
        "--impl",
        nargs="+",
        choices=(*IMPLS, ALTERNATIVES),
        default=(),
        help="default: ours that can run, but the reference, and all alternatives",
    )
    parser.add_argument("--mode", choices=MODES, help="default: all that an op has")
    parser.add_argument("--threads", type=int, help="on a CPU; default: torch's own number")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each row")
    parser.add_argument("--out", metavar="FILE.csv", help="file for the rows")
    parser.add_argument("--plot", action="store_true", help="with --out: curves beside it, as PNG")
    options = parser.parse_args()
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; known: {', '.join(OPS)}")
    if options.plot and not options.out:
        parser.error("--plot needs --out: the picture goes beside the rows")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: torch.cuda.is_available() is False")
    return options


if __name__ == "__main__":
    sys.exit(main())

"""Whether `auto` takes the fastest build: `python bench/isa.py [ops…]`; see --help.

The C++ kernels are compiled once for each instruction set, and `auto` takes the best that the CPU
has, for all ops. Here all that it has run in turn, in one process and on the same tensors, each
checked against float64 before. Where another one is faster, its kernel has a bug to be found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from unittest import mock

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import machine, table
from bench.case import SIZES, Case, Inputs, Mode
from bench.check import error, exact
from bench.measure import call_of
from bench.registry import cases
from bench.timing import Call, Timing, time_in_turn
from ppo_engine.memory import keep_freed_memory
from ppo_kernels import dispatch

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOWER, UNCLEAR = "SLOWER", "unclear"
_FORCED = "PPO_KERNELS_ISA"
_MARGIN = 1.03  # what two placements of the same code and data may differ by


def main() -> int:
    options = _options()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    builds = load_builds()
    names = ", ".join(builds)
    table.say(f"{machine.describe(CPU)}, {torch.get_num_threads()} threads; ms with {names}\n")
    found = []
    for case in every_dtype(options.ops, options.sizes):
        for mode, timings in measure(case, builds, options.seconds):
            found.append(verdict(timings))
            times = "".join(f"{timing.p50 * 1e3:10.4g}" for timing in timings.values())
            *others, chosen = (timing.p50 for timing in timings.values())
            ratio = f"{chosen / min(others):6.2f}" if others else ""
            table.say(f"{case!s:<48} {mode:<4} {times} {ratio}  {found[-1]}".rstrip())
    unclear, slower = (found.count(what) for what in (UNCLEAR, SLOWER))
    table.say(f"\n{len(found)} rows: {slower} slower, {unclear} unclear")
    return 1 if slower else 0


def load_builds() -> dict[str, ModuleType]:
    """The compiled module once for each instruction set, best last: it chooses one when loaded, so
    each is a copy of the file, under a name of its own."""
    builds = {}
    for isa in dispatch.cpu.supported_isas():
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {_FORCED: isa}):
            path = shutil.copy(dispatch.cpu.__file__, folder)
            loader = ExtensionFileLoader(f"{isa}._cpu", path)
            spec = spec_from_loader(loader.name, loader)
            assert spec is not None
            builds[isa] = module_from_spec(spec)
            loader.exec_module(builds[isa])
            assert builds[isa].isa() == isa
    return builds


def every_dtype(ops: list[str], sizes: list[str]) -> Iterator[Case]:
    """The cases whose time is that of C++ kernels, and not of torch's products, in each dtype; of
    ops that every build runs, so not `packed_linear`."""
    for case in cases("cpu", ops, sizes):
        everywhere = case.least is None and case.op != "packed_linear"
        if case.dtype == torch.float32 and everywhere:
            yield from (replace(case, dtype=dtype, inputs=partial(_inputs, case, dtype))
                        for dtype in DTYPES)  # fmt: skip


def _inputs(case: Case, dtype: torch.dtype, on: torch.device) -> Inputs:
    as_they_are = ("moments", *case.changed)
    return {
        name: x.to(dtype) if x.is_floating_point() and name not in as_they_are else x
        for name, x in case.inputs(on).items()
    }


def measure(
    case: Case, builds: Mapping[str, ModuleType], seconds: float
) -> Iterator[tuple[Mode, dict[str, Timing]]]:
    """How long each mode takes with each build, in turn. Raises WrongResult where one is wrong."""
    inputs = case.inputs(CPU)
    run = partial(case.ours, impl="cpp")
    truth = exact(case, inputs)
    before = dispatch.cpu
    try:
        for mode in case.costs:
            calls = {}
            for name, build in builds.items():
                dispatch.cpu = build
                error(case, inputs, run, truth, gradients=mode != "fwd")
                calls[name] = [partial(_call_with, build, call_of(case, mode, inputs, run))]
            yield mode, time_in_turn(CPU, calls, seconds)
    finally:
        dispatch.cpu = before


def _call_with(build: ModuleType, call: Call) -> None:
    dispatch.cpu = build  # here, as a backward pass looks for it when it runs
    call()


def verdict(timings: Mapping[str, Timing]) -> str:
    """Of the last one, which `auto` takes: slower where what another takes mostly is less than what
    it takes at best. Where only the medians say so, it may be noise."""
    *others, chosen = timings.values()
    if any(other.p80 * _MARGIN < chosen.p20 for other in others):
        return SLOWER
    return UNCLEAR if any(other.p50 * _MARGIN < chosen.p50 for other in others) else ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time the C++ kernels with every instruction set that this CPU has. The ratio "
        "is the time of the one that `auto` takes to that of the fastest other. Exit status 1 "
        "where it is slower by more than noise.",
        allow_abbrev=False,
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="default: all")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, metavar="SIZE")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each")
    options = parser.parse_args()
    unknown = [op for op in options.ops if op not in dispatch.OPS]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; known: {', '.join(dispatch.OPS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())

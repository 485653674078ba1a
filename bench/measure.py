"""From a case to its rows: every implementation checked, timed in turn, its memory measured."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from bench.case import MODES, Case, Inputs, Mode, Run, fresh, gradients, leaves_of
from bench.check import WrongResult, error, exact
from bench.machine import Ceilings, least_call, least_traffic
from bench.results import Row
from bench.timing import Call, Timing, peak_extra_bytes, time_in_turn
from ppo_kernels import implementations
from ppo_kernels.dispatch import accumulator

ALTERNATIVES = "alternatives"
# On a GPU, so many copies of the inputs that they outgrow its cache together. A CPU's cases are
# either far larger than its cache or meant to fit.
_ROTATED_BYTES = 256 * 2**20
_MOST_COPIES = 16
_LEAST, _CALL = "the least", "least call"


def measure(
    case: Case,
    ceilings: Ceilings,
    *,
    device: torch.device,
    modes: Sequence[Mode] = MODES,
    impls: Sequence[str] = (),
    seconds: float = 1.0,
) -> Iterator[list[Row]]:
    """The rows of each mode that the case has, one for each implementation.

    `impls` names ours, and ALTERNATIVES all others; without names, all that can run here but our
    reference. A row whose result is wrong, or that could not run, has a `status` and no time.
    """
    inputs = case.inputs(device)
    wanted: list[Mode] = [mode for mode in case.costs if mode in modes]
    runs = dict(_implementations(case, impls))
    # Its gradients cost the most memory of all, so only where a backward pass is measured.
    truth = exact(case, inputs) if wanted else ()
    for mode in wanted:
        rows: dict[str, Row] = {}
        # The smallest case is there to show what a call costs the host.
        replayed = device.type == "cuda" and case.size != "small"
        calls = _least(case, mode, inputs, ceilings, device, replayed)
        for name, run in runs.items():
            rows[name] = row = _described(case, mode, name)
            try:
                row["error"] = error(case, inputs, run, truth, gradients=mode != "fwd")
                call = call_of(case, mode, inputs, run)
                row["peak_bytes"] = peak_extra_bytes(device, call)
                row["extra_bytes"] = row["peak_bytes"] - case.kept.get(mode, 0)
                calls[name] = [call, *_copies(case, mode, inputs, run, device)]
            except WrongResult as wrong:
                row["status"] = f"wrong: {wrong}"
            except (RuntimeError, ImportError) as failure:  # out of memory among them
                row["status"] = str(failure).strip().splitlines()[0][:120]
        timings = time_in_turn(device, calls, seconds, replayed=replayed)
        del calls
        gc.collect()
        _fill(case, mode, ceilings, rows, timings)
        yield list(rows.values())
    torch._dynamo.reset()  # it gives up on functions compiled for many shapes


def _implementations(case: Case, impls: Sequence[str]) -> Iterator[tuple[str, Run]]:
    for impl, availability in implementations()[case.op].items():
        belongs = {"reference": case.device, "cpp": "cpu"}.get(impl, "cuda") == case.device
        can_run = availability.available and belongs  # Triton's interpreter is not for timing
        if impl in impls or (not impls and can_run and impl != "reference"):
            yield impl, partial(case.ours, impl=impl)
    if not impls or ALTERNATIVES in impls:
        yield from case.alternatives.items()


def call_of(case: Case, mode: Mode, inputs: Inputs, run: Run) -> Call:
    if mode == "fwd":
        inputs = fresh(case, inputs)
        return lambda: run(inputs)
    leaves = leaves_of(case, inputs)
    if mode == "both":
        return lambda: gradients(case, run(leaves), leaves)
    outputs = run(leaves)
    return lambda: gradients(case, outputs, leaves, retain=True)


def _copies(
    case: Case, mode: Mode, inputs: Inputs, run: Run, device: torch.device
) -> Iterator[Call]:
    for _ in range(_rotated(device, sum(x.nbytes for x in inputs.values())) - 1):
        yield call_of(case, mode, copy.deepcopy(inputs), run)  # strides stay, and shared memory


def _rotated(device: torch.device, size: float) -> int:
    """How many copies of tensors of that size are rotated through."""
    return 1 if device.type == "cpu" else min(_MOST_COPIES, math.ceil(_ROTATED_BYTES / size))


def _least(
    case: Case,
    mode: Mode,
    inputs: Inputs,
    ceilings: Ceilings,
    device: torch.device,
    replayed: bool,
) -> dict[str, list[Call]]:
    """What the floor is measured by: the bytes moved and no more, or what the case says, and a call
    of an op. In turn with the rows, so that what slows the machine down for a while slows both.
    """
    least = {_CALL: [least_call(device)]}
    if case.least is not None:
        return least | {f"{_LEAST} 0": case.least(inputs, mode)}
    cost = case.costs[mode]
    if not replayed and (cost.read + cost.written) / ceilings.read < ceilings.call:
        return least  # to move so little would mostly be the call of what moves it
    copies = _rotated(device, cost.read + cost.written)
    traffic = [least_traffic(device, cost.read, cost.written) for _ in range(copies)]
    return least | {f"{_LEAST} {i}": [*w] for i, w in enumerate(zip(*traffic, strict=True))}


def _described(case: Case, mode: Mode, impl: str) -> Row:
    return {
        "op": case.name,
        "size": case.size,
        "impl": impl,
        "mode": mode,
        "shape": case.shape,
        "dtype": case.dtype_name,
        "status": "ok",
    } | dict.fromkeys(
        ("ms_p20", "ms_p50", "ms_p80", "gb_per_s", "tflop_per_s", "x_floor", "x_best_alternative",
         "peak_bytes", "extra_bytes", "error", "floor_ms", "call_ms")
    )  # fmt: skip


def _fill(
    case: Case, mode: Mode, ceilings: Ceilings, rows: dict[str, Row], timings: dict[str, Timing]
) -> None:
    """Times, and the ratios that give them a meaning."""
    cost = case.costs[mode]
    floor = max(
        min((x.p50 for name, x in timings.items() if name.startswith(_LEAST)), default=0.0),
        0.0 if case.least else cost.flops / ceilings.matmul.get(accumulator(case.dtype), math.inf),
        timings[_CALL].p50,
    )
    best_alternative = min(
        (timings[n].p50 for n in case.alternatives if n in timings), default=None
    )
    for name, row in rows.items():
        row["floor_ms"], row["call_ms"] = floor * 1e3, timings[_CALL].p50 * 1e3
        if name not in timings:
            continue
        timing = timings[name]
        row |= {
            "ms_p20": timing.p20 * 1e3,
            "ms_p50": timing.p50 * 1e3,
            "ms_p80": timing.p80 * 1e3,
            "gb_per_s": (cost.read + cost.written) / timing.p50 / 1e9,
            "tflop_per_s": cost.flops / timing.p50 / 1e12,
            "x_floor": timing.p50 / floor,
        }
        if name not in case.alternatives and best_alternative is not None:
            row["x_best_alternative"] = best_alternative / timing.p50

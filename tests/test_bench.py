"""The benchmark harness: what it lets through, and what its numbers mean."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import ops
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import speed_page, timing
from bench.case import Case, Cost, Inputs, Outputs, leaves_of
from bench.check import WrongResult, error, exact
from bench.machine import Ceilings, least_traffic, measure_ceilings, slug
from bench.measure import ALTERNATIVES, measure
from bench.plot import plot
from bench.registry import cases
from bench.results import Row, read_csv, write_csv
from bench.targets import TARGETS, verdicts
from bench.timing import Timing, peak_extra_bytes, time_in_turn
from ppo_engine.memory import keep_freed_memory, release_freed_memory
from ppo_engine.models import rates
from ppo_kernels import token_logprobs
from ppo_kernels.dispatch import OPS

CPU = torch.device("cpu")
CEILINGS = Ceilings(read=4e10, write=3e10, copy=2e10, matmul={torch.float32: 1e11}, call=1e-6)


def small(op: str) -> Case:
    return next(case for case in cases("cpu", [op], ["small"]))


def rows_of(case: Case, **settings: object) -> list[Row]:
    found = measure(case, CEILINGS, device=CPU, seconds=0.002, **settings)  # type: ignore[arg-type]
    return [row for rows in found for row in rows]


def without_compiling(case: Case) -> Case:
    """Compiling takes seconds a case, and is torch's to test."""
    kept = {n: run for n, run in case.alternatives.items() if "compiled" not in n}
    return replace(case, alternatives=kept)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_every_size(device: str) -> None:
    for op in OPS:
        if device == "cuda" and op == "packed_linear":
            continue  # for CPUs only
        assert {case.size for case in cases(device, [op])} == {"small", "medium", "large"}, op


@pytest.mark.parametrize("op", OPS)
def test_every_alternative_is_right_and_gets_a_time(op: str) -> None:
    case = without_compiling(small(op))
    rows = rows_of(case)
    assert {row["impl"] for row in rows} == {"cpp", *case.alternatives}
    assert {row["mode"] for row in rows} == set(case.costs)
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["x_floor"] == pytest.approx(row["ms_p50"] / row["floor_ms"])
        assert row["peak_bytes"] > 0 or case.changed  # what works in place may need none
    ours = [row for row in rows if row["impl"] == "cpp"]
    for row in ours:
        best = min(r["ms_p50"] for r in rows if r["mode"] == row["mode"] and r["impl"] != "cpp")
        assert row["x_best_alternative"] == pytest.approx(best / row["ms_p50"])


def wrong_value(case: Case, inputs: Inputs, impl: str) -> Outputs:
    first, *others = case.ours(inputs, impl)
    off = torch.zeros_like(first)
    off.view(-1)[-1] = 0.01
    return first + off, *others


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 2 * grad


def wrong_gradient(case: Case, inputs: Inputs, impl: str) -> Outputs:
    first, *others = case.ours(inputs, impl)
    return Doubled.apply(first), *others


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_kernel_gets_no_time(op: str) -> None:
    case = without_compiling(small(op))
    for row in rows_of(replace(case, ours=partial(wrong_value_unless_exact, case)), impls=["cpp"]):
        assert row["status"].startswith("wrong"), row
        assert row["ms_p50"] is None and row["x_floor"] is None and row["gb_per_s"] is None


def wrong_value_unless_exact(case: Case, inputs: Inputs, impl: str) -> Outputs:
    run = case.ours if impl == "reference" else partial(wrong_value, case)
    return run(inputs, impl)


def test_a_wrong_gradient_gets_no_time_where_it_is_timed() -> None:
    case = without_compiling(small("ppo_policy_loss"))

    def ours(inputs: Inputs, impl: str) -> Outputs:
        return (
            case.ours(inputs, impl) if impl == "reference" else wrong_gradient(case, inputs, impl)
        )

    status = {
        row["mode"]: row["status"] for row in rows_of(replace(case, ours=ours), impls=["cpp"])
    }
    assert status["fwd"] == "ok"
    assert status["both"].startswith("wrong")


def test_nan_and_missing_results_are_wrong() -> None:
    case = small("gae")
    inputs = case.inputs(CPU)
    truth = exact(case, inputs)
    with pytest.raises(WrongResult, match="nan"):
        nan = torch.full_like(truth[0], torch.nan)
        error(case, inputs, lambda x: (nan, nan), truth, gradients=False)
    with pytest.raises(WrongResult, match="1 results in place of 2"):
        error(case, inputs, lambda x: (truth[0],), truth, gradients=False)
    with pytest.raises(WrongResult, match="shape"):
        error(case, inputs, lambda x: (truth[0][1:], truth[1]), truth, gradients=False)


def test_exact_in_chunks_is_exact() -> None:
    case = small("token_logprobs")
    inputs = case.inputs(CPU)
    for whole, parts in zip(
        exact(replace(case, chunk=None), inputs), exact(replace(case, chunk=3), inputs), strict=True
    ):
        torch.testing.assert_close(whole, parts)


def test_what_cannot_run_says_why() -> None:
    def fails(x: Inputs) -> Outputs:
        raise RuntimeError("out of memory\nand more")

    case = replace(small("gae"), alternatives={"too large": fails})
    (row,) = rows_of(case, impls=[ALTERNATIVES])
    assert row["status"] == "out of memory" and row["ms_p50"] is None


@pytest.mark.parametrize(
    ("cost", "times", "floor"),
    [
        (Cost(1e6, 1e6, 0), {"least call": 1e-6, "the least 0": 3e-3}, 3.0),
        (Cost(1e6, 0, 0), {"least call": 1e-6, "the least 0": 3e-3, "the least 1": 2e-3}, 2.0),
        (Cost(8, 8, 0), {"least call": 5e-6}, 0.005),
        (Cost(8, 8, 1e12), {"least call": 5e-6}, 1e4),
    ],
    ids=["copy", "the quicker read", "call", "arithmetic"],
)
def test_floor(
    monkeypatch: pytest.MonkeyPatch, cost: Cost, times: dict[str, float], floor: float
) -> None:
    def timed(
        device: torch.device, calls: Any, seconds: float, *, replayed: bool
    ) -> dict[str, Timing]:
        assert times.keys() < calls.keys()
        return {name: Timing(x, x, x) for name in calls for x in [times.get(name, 0.07)]}

    monkeypatch.setattr(sys.modules["bench.measure"], "time_in_turn", timed)
    for row in rows_of(replace(small("gae"), costs={"fwd": cost})):
        assert row["floor_ms"] == pytest.approx(floor)
        assert row["x_floor"] == pytest.approx(70 / floor)


def test_the_floor_of_the_linear_ops_is_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small("linear_ppo_loss")
    inputs = case.inputs(CPU)
    assert case.least is not None
    with ops.Watch() as watch:
        for call in case.least(inputs, "both"):
            call()
    assert watch.products == 3

    def timed(device: torch.device, calls: Any, seconds: float, *, replayed: bool) -> Any:
        return {name: Timing(x, x, x) for name in calls for x in [0.2 if "least" in name else 0.3]}

    monkeypatch.setattr(sys.modules["bench.measure"], "time_in_turn", timed)
    for row in rows_of(without_compiling(case)):
        assert row["floor_ms"] == pytest.approx(200)
        assert row["peak_bytes"] - row["extra_bytes"] == 4 * 16 * (8 + 64)


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_ppo_loss"])
def test_linear_ops_in_bfloat16(op: str, either_cpu: bool) -> None:
    """All are right; the floor's products are in bfloat16 where the CPU multiplies it."""
    bf16 = torch.bfloat16
    [case] = [case for case in cases("cpu", [op], ["small"]) if case.dtype == bf16]
    rows = rows_of(without_compiling(case))
    assert all(row["status"] == "ok" for row in rows)
    if op == "linear_ppo_loss":
        kept = 16 * (4 * 8 + (2 if either_cpu else 4) * 64)
        assert all(row["peak_bytes"] - row["extra_bytes"] == kept for row in rows)
    made = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            if func.overloadpacket == torch.ops.aten.mm:
                made.append(found.dtype)
            return found

    assert case.least is not None
    [products] = case.least(case.inputs(CPU), "both")
    with Products():
        products()
    assert made == [bf16 if either_cpu else torch.float32] * 3


def test_targets_of_memory_and_of_eager() -> None:
    row: Row = {
        "op": "linear_ppo_loss", "shape": "1024x576x49152", "dtype": "float32", "mode": "both",
        "size": "large", "ms_p50": 2.0, "floor_ms": 1.0, "call_ms": 0.1, "x_floor": 2.0,
    }  # fmt: skip
    ours = row | {"impl": "cpp", "extra_bytes": 63e6}
    eager = row | {"impl": "eager", "ms_p50": 5.0}
    lines = [line for line in verdicts([ours, eager], "cpu") if "linear_ppo_loss" in line]
    assert [line.split()[-1] for line in lines] == ["MISSED", "met", "met"]
    assert "2.00x the floor" in lines[0] and "0.40x the eager" in lines[1]
    assert "63 MB extra" in lines[2]
    (missed,) = (x for x in verdicts([ours | {"extra_bytes": 65e6}], "cpu") if "65 MB extra" in x)
    assert missed.endswith("MISSED")


def test_least_traffic_moves_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["bench.machine"]._BYTES, "cpu", 1000)
    moved = []

    class Moved(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            moved.append(sum(x.nbytes for x in args if isinstance(x, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    for read, written in ((4000, 0), (6000, 2000), (400, 400)):
        for way in least_traffic(CPU, read, written):
            moved.clear()
            with Moved():
                way()
            assert sum(moved) == read + written


def test_ceilings_are_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["bench.machine"]._BYTES, "cpu", 2**22)
    monkeypatch.setitem(rates._SIZE, "cpu", 128)
    found = measure_ceilings(CPU, [torch.float32])
    assert min(found.read, found.write, found.copy) > 1e8
    assert found.matmul[torch.float32] > 1e8 and 1e-8 < found.call < 1e-2
    assert slug(CPU).replace("-", "").isalnum()


def test_times_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.0)
    calls = {name: [partial(seen.append, name)] for name in "abc"}
    found = time_in_turn(CPU, calls, seconds=0.0)
    rounds = ["".join(seen[-n : len(seen) - n + 3]) for n in (9, 6, 3)]
    assert {"".join(sorted(x)) for x in rounds} == {"abc"} and len(set(rounds)) > 1
    assert all(t.p20 <= t.p50 <= t.p80 for t in found.values())


def test_peak_extra_memory() -> None:
    x = torch.ones(1000)
    assert peak_extra_bytes(CPU, lambda: x + x) == pytest.approx(4000, abs=200)
    assert peak_extra_bytes(CPU, lambda: (x + x) * (x + x)) == pytest.approx(12000, abs=600)


# Prints the page faults of the last of some large tensors.
_COUNT_FAULTS = """
import resource, sys
import torch
from ppo_engine.memory import keep_freed_memory
from ppo_engine.models import rates

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc's malloc")
def test_freed_memory_is_kept() -> None:
    def faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _COUNT_FAULTS, how],
            check=True, capture_output=True, text=True, cwd=speed_page.ROOT,
        )  # fmt: skip
        return int(done.stdout)

    assert faults("keep") < 100 < faults("give back")


# Prints by how many MiB a process has shrunk: 64 tensors were freed, with one kept above each.
_COUNT_RELEASED = """
import psutil, torch
from ppo_engine.memory import keep_freed_memory, release_freed_memory

def resident():
    return psutil.Process().memory_info().rss / 2**20

assert keep_freed_memory()
tensors = [torch.ones(2**20) for _ in range(128)]  # 4 MiB each
del tensors[::2]
full = resident()
release_freed_memory()
print(full - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc's malloc")
def test_freed_memory_is_released() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_RELEASED], check=True, capture_output=True, text=True,
        cwd=speed_page.ROOT,
    )  # fmt: skip
    assert float(done.stdout) == pytest.approx(256, rel=0.1)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert keep_freed_memory() is False
    release_freed_memory()


def test_leaves_share_memory_and_leave_the_inputs_alone() -> None:
    case = small("ppo_policy_loss")
    inputs = case.inputs(CPU)
    leaves = leaves_of(case, inputs)
    assert leaves["logprobs"].requires_grad and not inputs["logprobs"].requires_grad
    assert leaves["logprobs"].data_ptr() == inputs["logprobs"].data_ptr()


def test_csv_and_picture(tmp_path: Path) -> None:
    rows = [
        row
        for case in cases("cpu", ["pairwise_loss"], ["small"])
        for row in rows_of(without_compiling(case))
    ]
    rows[0] = rows[0] | {"ms_p50": None, "status": "wrong: error"}
    write_csv(tmp_path / "new" / "ops.csv", "python bench/run.py pairwise_loss", rows)
    command, read = read_csv(tmp_path / "new" / "ops.csv")
    assert command == "python bench/run.py pairwise_loss"
    assert [row["impl"] for row in read] == [row["impl"] for row in rows]
    assert read[0]["ms_p50"] == ""
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ops.csv"]
    plot(rows, "a machine", tmp_path / "ops.png")
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_pages_have_the_figures_of_the_results(page: str) -> None:
    assert (speed_page.ROOT / page).read_text(encoding="utf-8") == speed_page.rewritten(page)


def test_headlines_compare_the_steps_that_have_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"model": "m", "dtype": "float32", "device": "a machine", "trl": "1.12.0"}
    seconds = {"generate": (1.0, 3.0), "update": (4.0, 2.0), "step": (6.0, 9.0)}
    rows: list[Row] = [
        {
            "side": side,
            "phase": phase,
            "seconds": of_sides[n],
            "peak_bytes": (n + 1) * 2**30,
            **about,
        }
        for phase, of_sides in seconds.items()
        for n, side in enumerate(("ours", "TRL"))
    ]
    write_csv(tmp_path / "a" / "e2e.csv", "", rows)
    write_csv(tmp_path / "a" / "e2e-8bit.csv", "", [r for r in rows if r["side"] == "ours"])
    monkeypatch.setattr(speed_page, "RESULTS", tmp_path)
    assert speed_page.headlines().splitlines()[2:] == [
        "| PPO, TRL 1.12.0: m, float32 | a machine | 6.0 | 9.0 | 1.5 | 3.0 | 0.5 | 1.0 | 2.0 |"
    ]
    grpo = [row | {"algorithm": "GRPO", "trl": "1.16.0"} for row in rows]
    write_csv(tmp_path / "a" / "e2e-grpo.csv", "", grpo)
    assert "| GRPO, TRL 1.16.0: m, float32 | a machine | 6.0 |" in speed_page.headlines()


def test_trls_kernels_are_given_what_their_signatures_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stand-ins with the parameters of TRL 1.16's, which needs a GPU."""

    class Chunked:
        @staticmethod
        def apply(  # type: ignore[no-untyped-def]
            hidden, weight, bias, targets, temperature, chunk_size,
            final_logit_softcapping=None, logit_scale=1.0, outputs=(),
        ):  # fmt: skip
            assert bias is final_logit_softcapping is None and outputs == ("entropy",)
            logits = (hidden @ weight.T) * logit_scale / temperature
            return *selected(logits, targets), None, None, None

    def selected(  # type: ignore[no-untyped-def]
        logits, index, temperature=1.0, row_mask=None
    ):
        return token_logprobs(logits, index, return_entropy=True)

    kernels = ModuleType("trl.kernels")
    kernels.__dict__.update(
        ChunkedLogProbFunction=Chunked, selective_log_softmax_and_entropy=selected
    )
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    monkeypatch.setitem(sys.modules, "trl.kernels", kernels)
    for case in cases("cuda", ["token_logprobs", "linear_logprobs", "linear_ppo_loss"], ["small"]):
        (run,) = (run for name, run in case.alternatives.items() if "TRL 1.16" in name)
        on_cpu = next(c for c in cases("cpu", [case.op], ["small"]) if c.name == case.name)
        inputs = {
            n: x.float() if x.is_floating_point() else x for n, x in on_cpu.inputs(CPU).items()
        }
        torch.testing.assert_close(run(inputs), on_cpu.ours(inputs, impl="reference"))


def test_cost_by_mode() -> None:
    logprob = next(c for c in cases("cpu", ["token_logprobs"], ["large"]))
    size = 2048 * 49152 * 4
    assert logprob.costs["fwd"] == Cost(size, 0, size)
    assert (logprob.costs["bwd"].read, logprob.costs["bwd"].written) == (size, size)
    (policy,) = cases("cpu", ["ppo_policy_loss"], ["large"])
    (value,) = cases("cpu", ["ppo_value_loss"], ["large"])
    tokens = 4096 * 1024
    # The mask is read by each.
    total = sum(c.costs["both"].read + c.costs["both"].written for c in (policy, value))
    assert total == (33 + 1) * tokens


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_target_is_of_a_case_that_is_measured(device: str) -> None:
    keys = {(c.name, c.shape, c.dtype_name, mode) for c in cases(device) for mode in c.costs}
    for target in TARGETS[device]:
        for op in target.ops:
            assert (op, target.shape, target.dtype, target.mode) in keys


def test_targets_are_judged() -> None:
    rows = [
        dict(op=op, size="large", impl=impl, mode="both", shape="4096x1024", dtype="float32",
             ms_p50=ms, floor_ms=floor)
        for op, impl, ms, floor in (
            ("ppo_policy_loss", "cpp", 2.0, 1.0), ("ppo_policy_loss", "reference", 9.0, 1.0),
            ("ppo_policy_loss", "masked, compiled", 3.0, 1.0), ("ppo_value_loss", "cpp", 1.0, 1.0),
            ("ppo_value_loss", "masked, compiled", 0.5, 1.0),
        )
    ]  # fmt: skip
    lines = sorted(verdicts(rows, "cpu"))
    assert len(lines) == 3
    assert "ppo_policy_loss + ppo_value_loss" in lines[0]
    assert "1.50x the floor" in lines[0] and lines[0].endswith("met")
    assert "1.5x faster" in lines[1] and lines[1].endswith("met")
    assert "0.5x faster" in lines[2] and lines[2].endswith("MISSED")
    small = dict(op="gae", size="small", impl="cpp", mode="fwd", shape="8x64", dtype="float32",
                 ms_p50=0.9, floor_ms=0.1, call_ms=0.1)  # fmt: skip
    (line,) = verdicts([small], "cpu")
    assert "9.0 torch.adds" in line and line.endswith("MISSED")
    # A floor that is more than a call, such as that of a product.
    assert not [*verdicts([small | {"floor_ms": 0.4}], "cpu")]

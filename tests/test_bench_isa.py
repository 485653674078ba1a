"""`bench/isa.py`: what it times is what it says, and what it calls slower."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import isa
from bench.case import Case
from bench.check import WrongResult
from bench.timing import Timing
from ppo_kernels import dispatch

pytestmark = pytest.mark.skipif(dispatch.cpu is None, reason="the extension is not built")


def small(op: str) -> Case:
    return next(isa.every_dtype([op], ["small"]))


class Changed:
    """A build of the extension with one function in another's place."""

    def __init__(self, build: Any, name: str, function: Callable[..., None]) -> None:
        self.build, self.name, self.function = build, name, function

    def __getattr__(self, name: str) -> Any:
        return self.function if name == self.name else getattr(self.build, name)


def test_every_instruction_set_is_loaded() -> None:
    builds = isa.load_builds()
    assert [*builds] == dispatch.cpu.supported_isas()
    assert [build.isa() for build in builds.values()] == [*builds]


@pytest.mark.parametrize(
    ("op", "mode", "kernel"),
    [
        ("gae", "fwd", "gae"),
        ("token_logprobs", "bwd", "token_logprobs_backward"),
        ("ppo_value_loss", "both", "ppo_value_loss"),
    ],
)
def test_a_timed_call_is_one_of_its_build(
    monkeypatch: pytest.MonkeyPatch, op: str, mode: str, kernel: str
) -> None:
    called: list[str] = []

    def noted(name: str, build: Any) -> Any:
        def function(*arguments: Any) -> None:
            called.append(name)
            getattr(build, kernel)(*arguments)

        return Changed(build, kernel, function)

    def timed(device: torch.device, calls: Mapping[str, Sequence[Any]], seconds: float) -> Any:
        called.clear()
        for (call,) in calls.values():
            call()
        return called.copy()

    monkeypatch.setattr(isa, "time_in_turn", timed)
    before = dispatch.cpu
    builds = {name: noted(name, build) for name, build in isa.load_builds().items()}
    found: dict[str, Any] = dict(isa.measure(small(op), builds, 0.0))
    assert found[mode] == [*builds]
    assert dispatch.cpu is before


def test_a_wrong_build_gets_no_time() -> None:
    def sevens(*arguments: Any) -> None:
        for x in arguments:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.fill_(7)

    builds: dict[str, Any] = {**isa.load_builds()}
    last = dispatch.cpu.supported_isas()[-1]
    builds[last] = Changed(builds[last], "gae", sevens)
    with pytest.raises(WrongResult):
        dict(isa.measure(small("gae"), builds, 0.0))


def test_every_op_with_kernels_comes_in_every_dtype() -> None:
    found = list(isa.every_dtype([], ["small"]))
    assert {case.op for case in found} == {
        "gae", "kl_shaped_gae", "token_logprobs", "ppo_policy_loss", "ppo_value_loss",
        "pairwise_loss", "ranking_loss", "sample", "decode_attention", "rotary_embedding",
        "rms_norm", "swiglu", "adamw",
    }  # fmt: skip
    for case in found:
        inputs = case.inputs(isa.CPU)
        assert case.dtype in {x.dtype for x in inputs.values()}
        same = [c for c in found if (c.name, c.shape) == (case.name, case.shape)]
        assert [c.dtype for c in same] == [*isa.DTYPES]


@pytest.mark.parametrize(
    ("avx2", "avx512", "verdict"),
    [
        (Timing(1.9, 2.0, 2.1), Timing(4.1, 4.3, 4.5), isa.SLOWER),
        (Timing(1.9, 2.0, 2.1), Timing(2.12, 2.2, 2.3), isa.UNCLEAR),
        (Timing(1.9, 2.0, 3.0), Timing(2.5, 3.0, 3.5), isa.UNCLEAR),
        (Timing(1.9, 2.0, 2.1), Timing(1.95, 2.05, 2.2), ""),
        (Timing(1.9, 2.0, 2.1), Timing(1.0, 1.1, 1.2), ""),
    ],
)
def test_slower_by_more_than_noise(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    avx2: Timing,
    avx512: Timing,
    verdict: str,
) -> None:
    timings = {"baseline": Timing(8.0, 9.0, 10.0), "avx2": avx2, "avx512": avx512}
    monkeypatch.setattr(isa, "time_in_turn", lambda *_: timings)
    monkeypatch.setattr(sys, "argv", ["isa.py", "gae", "--sizes", "small"])
    assert isa.main() == (verdict == isa.SLOWER)
    *lines, _, last = capsys.readouterr().out.splitlines()
    row = f"{avx512.p50 / avx2.p50:.2f}  {verdict}".rstrip()
    assert sum(line.endswith(row) for line in lines) == len(isa.DTYPES)
    slower, unclear = (3 * (verdict == what) for what in (isa.SLOWER, isa.UNCLEAR))
    assert last == f"3 rows: {slower} slower, {unclear} unclear"

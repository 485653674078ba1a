"""The same cases under pytest-benchmark: `pytest bench --benchmark-only`.

For whoever changes a kernel: `--benchmark-save=before`, then `--benchmark-compare=…before`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from bench.case import Case, Mode, gradients, leaves_of
from bench.registry import cases
from ppo_kernels import implementations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [impl for impl in ("cpp", "triton", "cuda") if implementations()["gae"][impl].available]

ROWS = [
    pytest.param(case, mode, impl, id=f"{case}-{mode}-{impl}")
    for case in cases(DEVICE)
    for mode in case.costs
    if mode != "bwd"
    for impl in IMPLS
    if (impl == "cpp") == (DEVICE == "cpu")
]


@pytest.mark.parametrize(("case", "mode", "impl"), ROWS)
def test_op(benchmark: Any, case: Case, mode: Mode, impl: str) -> None:
    inputs = case.inputs(torch.device(DEVICE))
    run = partial(case.ours, impl=impl)
    leaves = leaves_of(case, inputs) if mode == "both" else inputs

    def call() -> None:
        outputs = run(leaves)
        if mode == "both":
            gradients(case, outputs, leaves)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case} {mode}"
    benchmark(call)

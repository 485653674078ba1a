"""Random cases of every op (the first of those that `make fuzz` runs), and proof that the judge
finds what it is there to find."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ops
import pytest
import torch
from fuzz.cases import CASES, Case, make_case
from fuzz.check import Failure, Guard, check, kernel
from fuzz.draw import compact
from fuzz.shrink import explain, failures
from torch import Tensor

import ppo_kernels
from ppo_kernels import dispatch

pytestmark = pytest.mark.skipif(dispatch.cpu is None, reason="the C++ extension is not built")
FEW = 60


@pytest.mark.parametrize("op", CASES)
def test_random_cases(op: str) -> None:
    messages = failures(op, range(FEW))
    assert not messages, "\n".join(messages)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/test_gpu.py has it")
@pytest.mark.parametrize("op", CASES)
def test_random_cases_in_tritons_interpreter(op: str) -> None:
    """Which takes its time: small ones only."""
    pytest.importorskip("triton")
    run = partial(getattr(ppo_kernels, op), impl="triton")
    cases = (make_case(op, seed) for seed in range(200))
    small = (
        case for case in cases
        if all(x.numel() < 500 and (x.shape or [0])[0] < 20 for x in case.arguments.values()
               if isinstance(x, Tensor))
    )  # fmt: skip
    for case in islice(small, 12):
        check(case, run)


OTHERS = """
from fuzz.cases import CASES
from fuzz.shrink import failures
raise SystemExit("\\n".join(m for op in CASES for m in failures(op, range(20))) or 0)
"""


@pytest.mark.skipif("PPO_KERNELS_ISA" in os.environ, reason="is run for each itself")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_random_cases_on_other_instruction_sets(isa: str) -> None:
    if isa not in dispatch.cpu.supported_isas() or isa == dispatch.cpu.isa():
        pytest.skip("not on this machine, or tested already")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", OTHERS],
        env=os.environ | {"PPO_KERNELS_ISA": isa, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_case_is_the_same_again() -> None:
    for op in CASES:
        a, b = make_case(op, 19), make_case(op, 19)
        assert a.arguments.keys() == b.arguments.keys() and a.wrt == b.wrt
        for x, y in zip(a.arguments.values(), b.arguments.values(), strict=True):
            if isinstance(x, Tensor):
                assert x.stride() == y.stride() and x.storage_offset() == y.storage_offset()
                assert torch.equal(x.double().nan_to_num(7.0), y.double().nan_to_num(7.0))
            else:
                assert x == y


@pytest.mark.parametrize("op", CASES)
def test_cases_are_of_every_kind(op: str) -> None:
    """What the fuzz promises to try is there within the short run."""
    cases = [make_case(op, seed) for seed in range(FEW)]
    tensors = [x for case in cases for x in case.arguments.values() if isinstance(x, Tensor)]
    assert {x.dtype for x in tensors} >= {
        torch.float32, torch.float64, torch.bfloat16, torch.float16
    }  # fmt: skip
    assert any(not x.is_contiguous() for x in tensors)
    assert any(0 in x.stride() and x.numel() > 1 for x in tensors)
    assert any(x.numel() == 0 for x in tensors)
    assert any(x.numel() > 16_384 for x in tensors)
    if op in ("token_logprobs", "pairwise_loss", "ranking_loss"):
        return
    masks = [case.arguments["mask"] for case in cases if "mask" in case.arguments]
    assert any(mask.all() and mask.numel() for mask in masks)
    assert any(not mask.any() and mask.numel() for mask in masks)
    assert any(mask.any() and not mask.all() for mask in masks)
    packed = [case.arguments["cu_seqlens"] for case in cases if "cu_seqlens" in case.arguments]
    assert any((x.diff() == 0).any() for x in packed)


@pytest.mark.parametrize("op", CASES)
def test_outputs_lie_among_canaries(op: str) -> None:
    """All that a kernel writes, but for what is handed over as numbers or multiplied afterwards."""
    case = make_case(op, 19)
    with Guard() as guard:
        results = ops.run(kernel(op), case.arguments, case.wrt)
    guarded = {buffer.data_ptr() for buffer in guard.buffers}
    for name, x in results.items():
        if name != "output.moments" and (op == "token_logprobs" or "gradient" not in name):
            assert x.untyped_storage().data_ptr() in guarded, name


# --- The judge finds faults -----------------------------------------------------------------------

Op = Callable[..., Any]


def verdict(case: Case, run: Op) -> str:
    """What `check` says of this case with `run` in the place of the compiled op; "" if nothing."""
    try:
        check(case, run)
    except Failure as failure:
        return str(failure)
    return ""


def with_results(op: str, change: Callable[[str, Tensor], Tensor]) -> Op:
    """The compiled op, each of its results and gradients replaced by `change(name, x)`."""

    def run(**arguments: Any) -> Any:
        for name, x in arguments.items():
            if isinstance(x, Tensor) and x.requires_grad:
                arguments[name] = x.view_as(x)
                arguments[name].register_hook(partial(change, f"gradient of {name}"))
        result = kernel(op)(**arguments)
        for name, x in ops._flatten("output", result):
            x.data = change(name, x.detach())
        return result

    return run


@pytest.mark.parametrize("op", CASES)
def test_every_result_is_judged(op: str) -> None:
    """The largest element of one result is off by 1 in 4096: seen, and the result is named."""
    seen: dict[str, list[bool]] = {}
    for case in (make_case(op, seed) for seed in range(16)):
        for name, x in ops.run(kernel(op), case.arguments, case.wrt, case.upstream).items():
            if not x.isfinite().all() or not x.any() or x.dtype.itemsize == 2:
                continue

            def change(of: str, x: Tensor, name: str = name) -> Tensor:
                largest = x.abs() == x.abs().max() if of == name else torch.zeros(()).bool()
                return torch.where(largest, x * (1 + 2**-12), x)

            message = verdict(case, with_results(op, change))
            seen.setdefault(name, []).append(message.startswith(name))
    assert all(sum(of) >= 0.7 * len(of) for of in seen.values()), seen


@pytest.mark.parametrize("op", CASES)
def test_a_number_read_wrong_is_seen(op: str) -> None:
    """The last real number of an input is taken for another, as where a loop ends too early."""
    seen = []
    for case in (make_case(op, seed) for seed in range(30)):
        name, x = next((n, x) for n, x in case.arguments.items() if isinstance(x, Tensor))
        real = case.arguments.get("mask", torch.ones_like(x, dtype=torch.bool))
        if op == "token_logprobs":  # a class of some probability, and not the only one
            real = (case.arguments["targets"] != -100)[..., None] & (x.shape[-1] > 1)
            real = real & (x > x.nan_to_num(0.0).amax(-1, keepdim=True) - 3)
        if op == "ranking_loss" and x.numel():  # one of a pair, at least
            ranks = case.arguments["ranks"]
            real = (ranks >= 0) & (ranks < ranks.amax(-1, keepdim=True))
        if not real.any():
            continue
        at = tuple(real.nonzero()[-1].tolist())

        def run(name: str = name, at: Any = at, **arguments: Any) -> Any:
            other = arguments[name] + 0.0
            other[at] += 0.1 * (1 + other[at].detach().abs())
            return kernel(op)(**arguments | {name: other})

        seen.append(verdict(case, run) != "")
    assert len(seen) >= 10 and sum(seen) >= 0.8 * len(seen), seen


def write(x: Tensor, at: int) -> None:
    """One byte of the memory around `x`, counted from its first."""
    memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    memory[x.storage_offset() * x.element_size() + at] = 1


def past_the_end(**arguments: Any) -> Any:
    advantages, returns = kernel("gae")(**arguments)
    write(returns, returns.nbytes)
    return advantages, returns


def before_the_start(**arguments: Any) -> Any:
    advantages, returns = kernel("gae")(**arguments)
    write(advantages, -1)
    return advantages, returns


def into_an_input(**arguments: Any) -> Any:
    arguments["rewards"][0, 0] += 1
    return kernel("gae")(**arguments)


def beside_an_input(**arguments: Any) -> Any:
    write(arguments["values"], -1)
    return kernel("gae")(**arguments)


def not_all_written(**arguments: Any) -> Any:
    advantages, returns = kernel("gae")(**arguments)
    partly = torch.empty_like(returns)
    partly[:, 1:] = returns[:, 1:]
    return advantages, partly


def reads_what_is_masked(**arguments: Any) -> Any:
    advantages, returns = kernel("gae")(**arguments)
    return advantages, returns + 0 * arguments["values"]


def threads_matter(**arguments: Any) -> Any:
    advantages, returns = kernel("gae")(**arguments)
    if torch.get_num_threads() == 3:
        advantages[-1, -1] = torch.nextafter(advantages[-1, -1], torch.tensor(torch.inf))
    return advantages, returns


def another_dtype(**arguments: Any) -> Any:
    advantages, returns = kernel("gae")(**arguments)
    return advantages, returns.double()


def another_shape(**arguments: Any) -> Any:
    advantages, returns = kernel("gae")(**arguments)
    return advantages, returns.flatten()


def refuses(**arguments: Any) -> Any:
    raise ValueError("gae: not today")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (past_the_end, r"memory after an output of 24 bytes written, byte 0$"),
        (before_the_start, r"memory before an output of 24 bytes written, byte -1$"),
        (into_an_input, r"rewards, or memory around it, written"),
        (beside_an_input, r"values, or memory around it, written"),
        (not_all_written, r"output.1: 2 of 6 elements err too much; at \[0, 0\] kernel nan"),
        (reads_what_is_masked, r"output.1: 1 of 6 elements err too much; at \[1, 0\] kernel nan"),
        (threads_matter, r"output.0: not the same bits on 1 and 3 threads"),
        (another_dtype, r"output.1 is torch.float64 \(2, 3\), but should be torch.float32"),
        (another_shape, r"output.1 is torch.float32 \(6,\), but should be torch.float32 \(2, 3\)"),
        (refuses, r"raised ValueError: gae: not today"),
    ],
)
def test_faults_of_every_kind_are_seen(run: Op, message: str) -> None:
    mask = torch.tensor([[True, True, True], [False, True, True]])
    values = torch.randn(2, 3).masked_fill(~mask, torch.nan)
    arguments = {"rewards": torch.randn(2, 3), "values": values, "mask": mask}
    case = Case("gae", 0, {name: compact(x) for name, x in arguments.items()}, ())
    check(case)
    with pytest.raises(Failure, match=message):
        check(case, run)


def test_a_failure_says_how_to_see_it_again() -> None:
    """Of a fault that only a bootstrap brings out, a case is left with little but a bootstrap."""

    def run(**arguments: Any) -> Any:
        off = 1.0 if arguments.get("bootstrap") is not None else 0.0
        advantages, returns = kernel("gae")(**arguments)
        return advantages + off, returns

    seed = next(seed for seed in range(FEW) if verdict(make_case("gae", seed), run))
    case = make_case("gae", seed)
    with pytest.raises(Failure) as failure:
        check(case, run)
    text = explain(case, failure.value, run)
    assert f"PYTHONPATH=tests python -m fuzz gae {seed}" in text
    assert "bootstrap = " in text and "mask = " not in text
    assert "rewards = float32 [1], " in text

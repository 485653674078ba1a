"""The doctor names what is missing and what that costs, and fails for what is broken."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

import ppo_kernels
from ppo_engine import doctor
from ppo_kernels import dispatch

needs_cpp = pytest.mark.skipif(dispatch.cpu is None, reason="the compiled extension is not built")


def examine() -> tuple[int, str]:
    stream = io.StringIO()
    status = doctor.examine(doctor.Report(Console(file=stream, width=200, soft_wrap=True)))
    return status, stream.getvalue()


def without_cpp(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    table = {
        op: {**impls, "cpp": dispatch.Availability(False, reason)}
        for op, impls in ppo_kernels.implementations().items()
    }
    monkeypatch.setattr(ppo_kernels, "implementations", lambda: table)


def pretend_built(monkeypatch: pytest.MonkeyPatch, spec: object | None) -> None:
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: spec if name == "ppo_kernels._cpu" else honest(name, *rest),
    )


def test_healthy_machine() -> None:
    status, text = examine()
    assert status == 0 and "Everything that should work here does" in text
    for word in (
        "python",
        "torch",
        "transformers",
        "C++ compiler",
        "threads",
        "peft",
        "bitsandbytes",
        "tensorboard",
        "wandb",
        "trackio",
        "demo model",
    ):
        assert word in text
    assert "BROKEN" not in text


@needs_cpp
def test_every_op_is_checked() -> None:
    assert set(doctor._EXAMPLES) == set(ppo_kernels.implementations())
    text = examine()[1]
    for op, impls in ppo_kernels.implementations().items():
        for impl, (available, _) in impls.items():
            assert (f"{op} ({impl})" in text) == (available and impl != "reference")


def test_missing_extension_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cpp(monkeypatch, "no C++17 compiler was found")
    pretend_built(monkeypatch, None)
    status, text = examine()
    assert status == 0
    assert "no C++17 compiler was found; cost: ops on the CPU run in plain PyTorch" in text


def test_a_gpu_without_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch, "_cuda", lambda device=None: dispatch.Availability(False, "no nvcc")
    )
    monkeypatch.setattr(doctor, "_check", lambda *_: None)  # there is no GPU to check them on
    monkeypatch.setattr(doctor, "_machine", lambda report: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, text = examine()
    assert status == 0
    assert "no nvcc; cost: on a GPU, the Triton kernels run instead" in text


def test_extension_that_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cpp(monkeypatch, "undefined symbol")
    pretend_built(monkeypatch, object())
    status, text = examine()
    assert status == 1 and "Broken: cpp" in text and "undefined symbol" in text


@needs_cpp
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda result: tuple(tensor + 0.1 for tensor in result), "differs from the reference"),
        (lambda result: tuple(tensor * torch.nan for tensor in result), "differs from"),
        (lambda result: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["wrong", "nan", "raises"],
)
def test_wrong_op_is_broken(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any], message: str
) -> None:
    honest = ppo_kernels.gae

    def gae(*arguments: Any, impl: str, **options: Any) -> Any:
        result = honest(*arguments, impl=impl, **options)
        return result if impl == "reference" else spoil(result)

    monkeypatch.setattr(ppo_kernels, "gae", gae)
    status, text = examine()
    assert status == 1 and "Broken: gae (cpp)" in text and message in text

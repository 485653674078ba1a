"""Settings for all tests: one thread, the same random numbers in every run, Triton's kernels in its
interpreter where there is no GPU; and what a CPU says that it multiplies (CONTRIBUTING.md, "What a
machine can differ in")."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

if "OMP_NUM_THREADS" not in os.environ:
    # Read where numpy and torch are imported, and by the programs that tests start. Two tests run
    # at once: threads of one would spin, waiting for a core that the other has.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # Read where Triton and its kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from triton.language import core
    from triton.runtime import interpreter

    def call(self: Any, *given: Any, **named: Any) -> Any:
        """A function that a kernel calls. Triton's own replaces its whole language in each call,
        though it is replaced already: half of what a test of a kernel took."""
        if core.is_builtin(core.load):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*given, **named)

    interpreter.InterpretedFunction.__call__ = call

# What `head.multiplies` and the engine's `choose_dtype` ask a CPU.
QUESTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native-bf16",
        choices=("yes", "no"),
        default=os.environ.get("TEST_NATIVE_BF16"),
        help="run all tests as on a CPU that multiplies bfloat16 and float16 itself, or on one "
        "that does not, where `auto` computes in float32; default: the environment variable "
        "TEST_NATIVE_BF16, else what this CPU is",
    )


def pytest_configure(config: pytest.Config) -> None:
    if answer := config.getoption("--native-bf16"):
        if answer not in ("yes", "no"):
            raise pytest.UsageError(f"TEST_NATIVE_BF16 must be yes or no, but is {answer!r}")
        os.environ["TEST_NATIVE_BF16"] = answer  # for the pytest that a test may start
        answer_for_the_cpu({"yes": True, "no": False}[answer], pytest.MonkeyPatch())


def answer_for_the_cpu(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for question in QUESTIONS:
        monkeypatch.setattr(torch.cpu, question, lambda: native)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Seed torch before each test. One thread, whatever the last test set: two tests run at once,
    and tiny tensors gain nothing from more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Of curves: they take longer than the short runs of tests; test_report draws them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ppo", "supervised"):
            patch.setattr(f"ppo_engine.training.{name}.write_curves", lambda *_: None)
        yield


@pytest.fixture(params=["native bf16", "no native bf16"])
def either_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU that multiplies bfloat16 and float16 itself, where `auto` computes in bfloat16, and one
    that does not, both on this one; whether it is the first."""
    native = request.param == "native bf16"
    answer_for_the_cpu(native, monkeypatch)
    return native


@pytest.fixture(params=["in float32", "in their dtype", "as on a GPU"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what dtype `Head` multiplies bfloat16 and float16: on a CPU without instructions for them,
    on one with, and on a GPU, where the tokens without target stay among the others besides."""
    answer_for_the_cpu(request.param != "in float32", monkeypatch)
    if request.param == "as on a GPU":
        monkeypatch.setattr("ppo_kernels.head.leaves_out", lambda device: False)

"""Which implementation runs, and that each one that was compiled is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import ppo_kernels
from ppo_kernels import dispatch

TESTS = Path(__file__).parent
CPU = torch.device("cpu")


def needs_extension() -> None:
    if dispatch.cpu is None:
        pytest.skip(ppo_kernels.implementations()["gae"]["cpp"].reason)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_implementations_say_what_can_run_and_why_not() -> None:
    for op, table in ppo_kernels.implementations().items():
        assert callable(getattr(ppo_kernels, op))
        assert tuple(table) == dispatch.IMPLS
        assert table["reference"].available
        for availability in table.values():
            assert availability.reason
        if dispatch.cpu is not None:
            assert dispatch.cpu.isa() in table["cpp"].reason


def test_auto_takes_the_fastest_of_a_device() -> None:
    needs_extension()
    assert dispatch.resolve("gae", "auto", CPU) == "cpp"
    assert dispatch.resolve("gae", "auto", torch.device("cuda")) == "triton"
    assert dispatch.resolve("gae", "auto", torch.device("meta")) == "reference"


def test_auto_without_triton_on_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "_warn_missing", dispatch._warn_once, raising=False)
    dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain PyTorch, .* package triton is missing"):
        assert dispatch.resolve("gae", "auto", torch.device("cuda")) == "reference"


def test_an_implementation_that_cannot_run_says_why() -> None:
    needs_extension()
    with pytest.raises(RuntimeError, match=r"gae: impl='cpp' runs on CPU tensors, .* on cuda"):
        dispatch.resolve("gae", "cpp", torch.device("cuda"))
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run: "):
        dispatch.resolve("gae", "cuda", CPU)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about the CUDA kernels."""
    dispatch._cuda_on.cache_clear()
    yield
    dispatch._cuda_on.cache_clear()


class _Driver:
    """The CUDA module, on a machine whose driver says so."""

    device_type = "cuda"

    def __init__(self, why_not: str) -> None:
        self.answer = why_not

    def why_not(self) -> str:
        return self.answer


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("why_not", ["", "CUDA driver version is insufficient"])
def test_an_old_driver_is_a_reason(monkeypatch: pytest.MonkeyPatch, why_not: str) -> None:
    monkeypatch.setattr(dispatch, "cuda", _Driver(why_not))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "on", lambda device: nullcontext())
    table = ppo_kernels.implementations()
    assert table["gae"]["cuda"] == (not why_not, why_not or "compiled by nvcc")
    assert not table["token_logprobs"]["cuda"].available
    gpu = torch.device("cuda")
    assert dispatch.resolve("gae", "auto", gpu) == ("triton" if why_not else "cuda")
    assert dispatch.resolve("token_logprobs", "auto", gpu) == "triton"
    if why_not:
        with pytest.raises(RuntimeError, match="impl='cuda' cannot run: CUDA driver version"):
            dispatch.resolve("gae", "cuda", gpu)
    else:
        assert dispatch.resolve("gae", "cuda", gpu) == "cuda"
        with pytest.raises(RuntimeError, match=r"impl='cuda' runs on a GPU's tensors, .* on cpu"):
            dispatch.resolve("gae", "cuda", CPU)


@pytest.mark.skipif(dispatch.cuda is None, reason=dispatch._WHY_NO_CUDA)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_without_a_driver_the_cuda_kernels_say_so() -> None:
    assert "CUDA" in dispatch.cuda.why_not()


@pytest.mark.parametrize(
    ("recorded", "reason"),
    [
        (None, "_cuda is missing: install the package"),
        ({"cuda": {"built": False, "reason": "nvcc is not on the PATH"}}, "^nvcc .*fix that"),
        ({"cuda": {"built": True}}, "built for another Python"),
    ],
)
def test_what_was_not_built_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recorded: Any, reason: str
) -> None:
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    if recorded is not None:
        (tmp_path / "_build_info.json").write_text(json.dumps(recorded))
    assert re.search(reason, dispatch._why_not_built("cuda"))


def test_triton_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: no GPU: torch\.cuda"):
        dispatch.resolve("gae", "triton", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"runs on a GPU's tensors, but these are on cpu"):
        dispatch.resolve("gae", "triton", CPU)


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["ppo_kernels._cpu"] = None
import torch, ppo_kernels
x = torch.randn(2, 3)
compiled = torch.compile(ppo_kernels.gae, fullgraph=True, backend="aot_eager")
for gae in (compiled, ppo_kernels.gae) if "compiled" in sys.argv else (ppo_kernels.gae, compiled):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = gae(x, x)
        gae(x, x)
    print(len(caught), *[f"{w.category.__name__}: {w.message}" for w in caught])
    torch.testing.assert_close(result, ppo_kernels.gae(x, x, impl="reference"))
try:
    ppo_kernels.gae(x, x, impl="cpp")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_without_the_extension_auto_warns_once_and_goes_on(first: str) -> None:
    result = python("-c", WITHOUT_EXTENSION, first)
    assert result.returncode == 0, result.stderr
    first_call, second_call, explicit = result.stdout.splitlines()
    assert first_call.startswith("1 RuntimeWarning: ppo_kernels runs in plain PyTorch, several ")
    assert second_call == "0"
    assert explicit.startswith("gae: impl='cpp' cannot run: ")


def test_fake_tensors_do_not_reach_the_kernels() -> None:
    needs_extension()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(3, 5)
        advantages, _ = ppo_kernels.gae(x, x)
        logprobs = ppo_kernels.token_logprobs(x, torch.zeros(3, dtype=torch.int64))
    assert advantages.shape == (3, 5) and logprobs.shape == (3,)


def test_a_default_device_elsewhere_changes_nothing() -> None:
    x = torch.randn(3, 5)
    with torch.device("meta"):
        advantages, _ = ppo_kernels.gae(x, x)
    assert advantages.device == CPU


# What keeps torch, oneDNN and MKL to the instructions of such a CPU.
LIBRARIES = {
    "baseline": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "DEFAULT", "AVX512"),
}


@pytest.mark.parametrize("isa", LIBRARIES)
def test_every_instruction_set(isa: str) -> None:
    """All ops, values and gradients against float64, with our kernels and torch's as on a CPU that
    has no more than that."""
    needs_extension()
    if isa not in dispatch.cpu.supported_isas():
        pytest.skip(f"this machine runs {', '.join(dispatch.cpu.supported_isas())}")
    if isa == dispatch.cpu.isa():
        pytest.skip("the rest of the tests run on it")
    few = (
        "error_rule or option_native or every_half or half_way or any_block or offset or "
        "impossible or infinity or of_the_reference"
    )
    names = ("gae", "logprob", "ppo_loss", "policy_objectives", "pairwise_loss", "linear_logprob",
             "linear_ppo_loss", "sample", "decode_attention", "rotary_embedding", "rms_norm",
             "swiglu", "packed_linear", "adamw", "adamw_8bit")  # fmt: skip
    torchs, onednns, mkls = LIBRARIES[isa]
    native = "yes" if isa == "avx512" else "no"
    result = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"({few}) and not triton",
        *(str(TESTS / f"test_{name}.py") for name in names),
        PPO_KERNELS_ISA=isa, ATEN_CPU_CAPABILITY=torchs, ONEDNN_MAX_CPU_ISA=onednns,
        MKL_ENABLE_INSTRUCTIONS=mkls, TEST_NATIVE_BF16=native,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_the_instruction_set_can_be_forced() -> None:
    needs_extension()
    code = "from ppo_kernels import _cpu; print(_cpu.isa())"
    for isa in dispatch.cpu.supported_isas():
        assert python("-c", code, PPO_KERNELS_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_is_an_error() -> None:
    needs_extension()
    result = python("-c", "import ppo_kernels", PPO_KERNELS_ISA="sse9")
    assert result.returncode != 0
    assert "PPO_KERNELS_ISA is 'sse9', but this machine and build have: baseline" in result.stderr


def test_a_command_tells_of_an_unknown_instruction_set_without_a_traceback() -> None:
    needs_extension()
    result = python("-m", "ppo_engine", "doctor", PPO_KERNELS_ISA="sse9")
    assert result.returncode == 2
    told = "error: PPO_KERNELS_ISA is 'sse9', but this machine and build have: baseline"
    assert result.stderr.startswith(told) and result.stderr.count("\n") == 1


def test_kernels_that_are_older_than_their_sources_are_told(tmp_path: Path) -> None:
    module = tmp_path / "_cpu.so"
    module.touch()
    assert not dispatch._is_older_than_its_sources(module)
    os.utime(module, (0, 0))
    assert dispatch._is_older_than_its_sources(module)


FORK = """
import os, torch, ppo_kernels
torch.set_num_threads(2)
x = torch.randn(64, 4096)
{start}
child = os.fork()
advantages, _ = ppo_kernels.gae(x, x, impl="cpp")
# A parallel loop of torch's own would wait for ever for the threads that the child lacks.
torch.set_num_threads(1)
expected, _ = ppo_kernels.gae(x, x, impl="cpp")
assert advantages.numpy().tobytes() == expected.numpy().tobytes()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize(
    "start",
    ['ppo_kernels.gae(x, x, impl="cpp")', "torch.ones(2**22).add_(1)"],
    ids=["ours", "torch"],
)
def test_threads_survive_a_fork(start: str) -> None:
    """Whoever started them."""
    needs_extension()
    result = python("-W", "ignore", "-c", FORK.format(start=start))
    assert result.returncode == 0, result.stderr


COUNT_THREADS = """
import os, torch, ppo_kernels
torch.set_num_threads(3)
torch.ones(2**22).add_(1)  # starts torch's
before = len(os.listdir("/proc/self/task"))
x = torch.randn(64, 4096)
ppo_kernels.gae(x, x, impl="cpp")
assert len(os.listdir("/proc/self/task")) == before > 2
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux tells the threads")
def test_the_threads_are_those_of_torch() -> None:
    needs_extension()
    result = python("-W", "ignore", "-c", COUNT_THREADS)
    assert result.returncode == 0, result.stderr


def test_calls_from_several_python_threads() -> None:
    needs_extension()
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(3)
    x = torch.randn(64, 1024)
    expected, _ = ppo_kernels.gae(x, x)

    def call(_: int) -> Any:
        return ppo_kernels.gae(x, x)[0]

    with ThreadPoolExecutor(4) as executor:
        for advantages in executor.map(call, range(200)):
            assert torch.equal(advantages, expected)

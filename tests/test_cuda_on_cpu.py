"""The CUDA kernels without a GPU: run on the CPU by tests/cuda_on_cpu, and compiled by nvcc."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from fuzz.cases import make_case
from fuzz.check import Failure, check

import ppo_kernels
from ppo_kernels import dispatch, reference

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests" / "cuda_on_cpu"
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = [
    "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    # Of unrolling, of contexts that return twice, of what only a GPU does.
    "-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-maybe-uninitialized", "-Wno-unused-parameter",
]  # fmt: skip
CASES = 20
TARGETS = (80, 90, 100)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = tmp_path_factory.mktemp("cuda") / f"_cuda_on_cpu{suffix}"
    paths = (SHIM, sysconfig.get_path("include"), pybind11.get_include())
    includes = [f"-I{path}" for path in paths]
    subprocess.run(
        ["g++", *FLAGS, *includes, str(SHIM / "module.cpp"), "-o", str(target)], check=True
    )
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", target)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(params=[1, 40], ids="{}-processors".format)
def processors(
    request: pytest.FixtureRequest, module: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """Of few, a warp takes a row; of many, a block, or a row is split into chunks."""
    monkeypatch.setattr(dispatch, "cuda", module)
    dispatch._cuda_on.cache_clear()
    module.pretend_processors(request.param)
    yield request.param
    dispatch._cuda_on.cache_clear()


@pytest.mark.parametrize("op", dispatch.WITH_CUDA)
def test_random_cases(op: str, processors: int) -> None:
    run = partial(getattr(ppo_kernels, op), impl="cuda")
    messages = []
    for seed in range(CASES):
        try:
            check(make_case(op, seed), run, guarded=False)
        except Failure as failure:
            messages.append(f"seed {seed}: {failure}")
    assert not messages, "\n".join(messages[:5])


@pytest.mark.parametrize("shape", [(3, 9000), (2, 2051), (70, 300), (5, 4100), (1, 140_000)])
@pytest.mark.parametrize("packed", [False, True])
def test_long_rows(shape: tuple[int, int], packed: bool, processors: int) -> None:
    """Walked through by a warp, by a block, and in chunks: of the last, more than a warp's 32."""
    generator = torch.Generator().manual_seed(1)
    rows, length = shape
    lengths = torch.randint(0, length, (rows,), generator=generator)
    if packed:
        tokens = torch.randn(3, int(lengths.sum()), generator=generator)
        layout = {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}
    else:
        tokens = torch.randn(3, rows, length, generator=generator)
        layout = {"mask": torch.rand(shape, generator=generator) < 0.9}
    scores = torch.randn(rows, generator=generator)
    for estimator in ("k1", "k3"):
        given: dict[str, Any] = {"kl_coef": 0.1, "gamma": 0.99, "kl_estimator": estimator} | layout
        found = ppo_kernels.kl_shaped_gae(scores, *tokens, **given, impl="cuda")
        expected = reference.kl_shaped_gae(scores.double(), *tokens.double(), **given)
        for a, b in zip(found, expected, strict=True):
            scale = b.abs().max().item()
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5 * scale)


def test_no_rows(processors: int) -> None:
    assert ppo_kernels.implementations()["gae"]["cuda"].available
    empty = ppo_kernels.kl_shaped_gae(
        torch.zeros(0), *torch.zeros(3, 0, 5), kl_coef=torch.tensor(0.1), impl="cuda"
    )
    assert empty.moments.tolist() == [0, 0, 0]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", [path.name for path in sorted(SOURCES.glob("*.cu"))])
def test_nvcc_spills_nothing(source: str, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in TARGETS]
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas=-v", "--threads=0", *targets, "-c",
               str(SOURCES / source), "-o", str(tmp_path / "object.o")]  # fmt: skip
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(TARGETS)
    assert set(spills) == {("0", "0")}

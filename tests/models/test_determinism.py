"""What a deterministic run does not let decide: threads, and how much memory is free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny import tiny_model, tiny_model_folder
from trainers import length_reward

from ppo_engine import PPOEngine
from ppo_engine.errors import UserError
from ppo_engine.models.budget import Budget
from ppo_engine.models.determinism import compute_deterministically, is_deterministic
from ppo_engine.models.reader import Limit
from ppo_engine.rollout import sampling
from ppo_engine.rollout.slots import Heads
from ppo_engine.settings.schema import PPOConfig, RunConfig, SFTConfig
from ppo_engine.training.sft import SFTTrainer
from ppo_kernels import head

CPU = torch.device("cpu")
FULL = partial(torch.OutOfMemoryError, "CUDA out of memory.")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def engine(model: str, **run: Any) -> None:
    PPOEngine(model, length_reward, config=PPOConfig(run=RunConfig(dtype="float32", **run)))


def sft(model: str, **run: Any) -> None:
    rows = [{"prompt": f"Q{n}", "response": "yes"} for n in range(20)]
    SFTTrainer(model, rows, SFTConfig(run=RunConfig(dtype="float32", **run)))


@pytest.mark.parametrize("make", [engine, sft])
def test_a_deterministic_run_has_one_thread(make: Any, tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path)
    torch.set_num_threads(2)
    make(model)
    assert not is_deterministic() and torch.get_num_threads() == 2
    make(model, deterministic=True)
    assert is_deterministic() and torch.get_num_threads() == 1
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("free", [1.0, 2**60])
def test_the_memory_that_is_free_decides_nothing(
    free: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("models.reader", "rollout.sampling"):
        monkeypatch.setattr(f"ppo_engine.{module}.free_memory", lambda device: free)
    (tmp_path / "meminfo").write_text(f"MemAvailable: {free:.0f} kB\n")
    monkeypatch.setattr(head, "_MEMORY", tmp_path / "meminfo")
    heads = [Heads(count=2, key_size=8, value_size=8)]
    decoder: Any = SimpleNamespace(device=CPU, dtype=torch.float32, nbytes=0, steps=1, heads=heads)
    compute_deterministically()
    assert Limit.automatic(tiny_model()).tokens == 2048
    assert sampling._size(decoder, 100, 64, None)[0] == 100
    assert head._free_bytes(CPU) == float("inf")


def test_a_pass_without_memory_is_not_divided() -> None:
    tried = []

    def attempt(passes: list[list[int]]) -> None:
        tried.append(passes)
        raise FULL()

    compute_deterministically()
    budget = Budget(Limit(50), "ppo")
    with pytest.raises(
        UserError, match=r"pass of 50 tokens .* run\.deterministic is set it is not"
    ):
        budget.run([20, 30], attempt, packed=True)
    assert len(tried) == 1 and budget.limit == Limit(50)
    with pytest.raises(UserError, match=r"while 4 responses .* \(full\)\. As run\.deterministic"):
        sampling.Sampler._halve(cast(Any, SimpleNamespace()), 4, "full")

"""Under another default dtype of torch's, as people set it in their own programs to make a model,
each kind of training gives the same bits."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import tiny_model_folder
from trainers import PROMPTS, config, length_reward, planted_pairs, same, untimed, weights

from ppo_engine import PPOTrainer, RewardModelTrainer, SFTTrainer
from ppo_engine.settings.schema import (
    DemonstrationDataConfig,
    EvaluationConfig,
    ModelConfig,
    PreferenceDataConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def back() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def ppo(model: str, out: Path, quiet: Console) -> Path:
    settings = config(out, ppo={"stop_at_kl": 1e9})
    settings = replace(settings, evaluation=EvaluationConfig(prompts=2, every=1))
    PPOTrainer(model, length_reward, PROMPTS, config=settings, console=quiet).train()
    return out / "policy"


def reward(model: str, out: Path, quiet: Console) -> Path:
    data = PreferenceDataConfig(eval_fraction=0.25)
    run = RunConfig(output_dir=str(out), dtype="float32")
    settings = RewardModelConfig(ModelConfig(path=model), data, run=run)
    RewardModelTrainer(None, planted_pairs(16), settings, console=quiet).train()
    return out / "reward_model"


def sft(model: str, out: Path, quiet: Console) -> Path:
    data = DemonstrationDataConfig(eval_fraction=0.25)
    run = RunConfig(output_dir=str(out), dtype="float32")
    rows = [{"prompt": f"Case {i}?", "response": i * "so "} for i in range(2, 18)]
    SFTTrainer(model, rows, SFTConfig(data=data, run=run), console=quiet).train()
    return out / "policy"


@pytest.mark.usefixtures("back")
@pytest.mark.parametrize("train", [ppo, reward, sft])
def test_it_changes_nothing(train: Callable[..., Path], model: str, tmp_path: Path) -> None:
    found: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        out = tmp_path / str(dtype)
        saved = train(model, out, Console(file=io.StringIO()))
        found.append((weights(saved), untimed(out / "metrics.jsonl")))
    (expected, metrics), (made, rows) = found
    assert rows == metrics
    assert same(made, expected)

"""Tiny runs of each command, in which everything that a checkpoint keeps matters."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from trainers import PROMPTS, config, planted_pairs

from ppo_engine.settings.schema import (
    DemonstrationDataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PreferenceDataConfig,
    RewardModelConfig,
    RewardModelSettings,
    RunConfig,
    SFTConfig,
    SFTSettings,
)
from ppo_engine.training.ppo import PPOTrainer
from ppo_engine.training.reward import RewardModelTrainer
from ppo_engine.training.sft import SFTTrainer

STEPS = 4


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(map(ord, response)) / 1e5 + random.random() for response in responses]


def ppo(model: str, folder: Path, *, reward: Any = noisy, **run: Any) -> PPOTrainer:
    random.seed(1)
    settings = config(folder, steps=STEPS, sample_every=1, seed=2, **run)
    policy = ModelConfig(optimizer=OptimizerConfig(learning_rate=3e-2))
    held_out = EvaluationConfig(prompts=2, every=2)
    settings = replace(settings, policy=policy, evaluation=held_out)
    return PPOTrainer(model, reward, PROMPTS, config=settings, console=Console(file=io.StringIO()))


def sft(model: str, folder: Path, **run: Any) -> SFTTrainer:
    settings = SFTConfig(
        data=DemonstrationDataConfig(eval_fraction=0.2),
        sft=SFTSettings(batch_size=2),
        run=RunConfig(output_dir=str(folder), dtype="float32", **run),
    )
    data = [{"prompt": f"Q{n}", "response": "yes" * n} for n in range(1, 11)]
    return SFTTrainer(model, data, settings, console=Console(file=io.StringIO()))


def reward_model(model: str, folder: Path, **run: Any) -> RewardModelTrainer:
    settings = RewardModelConfig(
        data=PreferenceDataConfig(eval_fraction=0.2),
        reward=RewardModelSettings(batch_size=2),
        run=RunConfig(output_dir=str(folder), dtype="float32", **run),
    )
    quiet = Console(file=io.StringIO())
    return RewardModelTrainer(model, planted_pairs(10), settings, console=quiet)

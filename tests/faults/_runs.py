"""Tiny runs of each command, in which everything that a checkpoint keeps matters."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from trainers import PROMPTS, config, planted_pairs

from ppo_engine.ppo.offloading import let_wait
from ppo_engine.settings.schema import (
    DemonstrationDataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
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


def ppo(
    model: str,
    folder: Path,
    *,
    reward: Any = noisy,
    change: Callable[[PPOConfig], PPOConfig] = lambda settings: settings,
    **run: Any,
) -> PPOTrainer:
    random.seed(1)
    settings = config(folder, steps=STEPS, sample_every=1, seed=2, **run)
    policy = ModelConfig(optimizer=OptimizerConfig(learning_rate=3e-2))
    held_out = EvaluationConfig(prompts=2, every=2)
    settings = change(replace(settings, policy=policy, evaluation=held_out))
    return PPOTrainer(model, reward, PROMPTS, config=settings, console=Console(file=io.StringIO()))


def one_base(model: str, folder: Path, **run: Any) -> PPOTrainer:
    """Policy and critic as adapters on the base that both share."""

    def change(settings: PPOConfig) -> PPOConfig:
        adapted = replace(settings.policy, lora=LoraConfig(rank=2))
        return replace(settings, policy=adapted, share_base=True)

    return ppo(model, folder, change=change, **run)


def waiting(model: str, folder: Path, **run: Any) -> PPOTrainer:
    """Packed passes, frozen layers that run once, and a reference that waits elsewhere: in other
    memory of this CPU."""

    def change(settings: PPOConfig) -> PPOConfig:
        passes = replace(settings.ppo, micro_batch_size=None, micro_batch_tokens=40)
        return replace(settings, policy=replace(settings.policy, trainable_layers=1), ppo=passes)

    trainer = ppo(model, folder, change=change, **run)
    engine = trainer.engine
    assert engine.reference is not None and engine.critic is not None
    frozen = {"reference": [engine.reference]}
    let_wait(frozen, frozen, [engine.policy, engine.critic], engine.device)
    return trainer


def grpo(model: str, folder: Path, **run: Any) -> PPOTrainer:
    def change(settings: PPOConfig) -> PPOConfig:
        return replace(settings, ppo=replace(settings.ppo, estimator="grpo", group_size=2))

    return ppo(model, folder, change=change, **run)


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

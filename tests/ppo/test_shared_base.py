"""Policy, critic and reward model as adapters and heads on one base, whose bare form is the
reference."""

from __future__ import annotations

import itertools
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import of_family
from reading import sequence_scores
from rich.console import Console
from rollouts import length, move, moved_engine, rollout_of
from tiny import tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from ppo_engine import (
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PPOEngine,
    RewardModelConfig,
    RewardModelTrainer,
    RunConfig,
)
from ppo_engine.errors import UserError
from trainers import planted_pairs

peft = pytest.importorskip("peft")

LORA = {"rank": 2, "alpha": 4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    of_family("llama", num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def train_reward(base: str, folder: Path, **settings: Any) -> RewardModelTrainer:
    config = RewardModelConfig(
        model=ModelConfig(path=base, lora=LoraConfig(**LORA), trainable_layers=1, **settings),
        run=RunConfig(output_dir=str(folder), dtype="float32", save_adapters=True),
    )
    trainer = RewardModelTrainer(
        None, planted_pairs(16), config, console=Console(file=io.StringIO())
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def reward(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward") / "run"
    train_reward(base, folder)
    return str(folder / "reward_model")


def test_x(base, reward):
    config = PPOConfig(policy=ModelConfig(path=base, lora=LoraConfig(**LORA), trainable_layers=1), run=RunConfig(dtype="float32"), share_base=True)
    engine = PPOEngine("", reward, config=config)
    print(engine.critic.model)
    roles = engine.policy, engine.critic, *engine.rewards.models
    found = {x.data_ptr(): x.nbytes for role in roles for x in role.model.parameters()}
    print(sum(found.values()), sum(x.nbytes for x in of_family("llama", num_hidden_layers=4).parameters()))

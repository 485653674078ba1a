"""RLHF on one machine: supervised fine-tuning, reward models from ranked answers, and PPO.

    from ppo_engine import PPOConfig, PPOTrainer
    PPOTrainer("path/to/model", reward=my_function, prompts=["…"], config=PPOConfig()).train()

`PPOEngine` gives the four calls of a PPO step to a training loop of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_engine.config import PPOConfig, RewardModelConfig, SFTConfig
    from ppo_engine.engine import PPOEngine
    from ppo_engine.errors import UserError
    from ppo_engine.ppo_trainer import PPOTrainer
    from ppo_engine.reward_trainer import RewardModelTrainer
    from ppo_engine.rollout import Experience, Rollout
    from ppo_engine.sft_trainer import SFTTrainer

# Loaded when first asked for: torch and transformers take seconds, and `ppo-engine --help` needs
# neither.
_HOMES = {
    "Experience": "rollout",
    "PPOConfig": "config",
    "PPOEngine": "engine",
    "PPOTrainer": "ppo_trainer",
    "RewardModelConfig": "config",
    "RewardModelTrainer": "reward_trainer",
    "Rollout": "rollout",
    "SFTConfig": "config",
    "SFTTrainer": "sft_trainer",
    "UserError": "errors",
}

__all__ = [
    "Experience",
    "PPOConfig",
    "PPOEngine",
    "PPOTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
    "Rollout",
    "SFTConfig",
    "SFTTrainer",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ppo_engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ppo_engine.{_HOMES[name]}"), name)

"""RLHF on one machine: supervised fine-tuning, reward models from ranked answers, and PPO.

    from ppo_engine import PPOConfig, PPOTrainer
    PPOTrainer("path/to/model", reward=my_function, prompts=["…"], config=PPOConfig()).train()

`PPOEngine` gives the four calls of a PPO step to a training loop of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_engine.errors import UserError
    from ppo_engine.ppo.engine import PPOEngine
    from ppo_engine.ppo.experience import Experience
    from ppo_engine.pretrained.classifier import value_model_class
    from ppo_engine.rollout.batch import Rollout
    from ppo_engine.settings.schema import (
        AdaptiveKLConfig,
        DemonstrationDataConfig,
        EnvironmentConfig,
        EvaluationConfig,
        GenerationConfig,
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        PPOConfig,
        PPOSettings,
        PreferenceDataConfig,
        PromptDataConfig,
        RewardConfig,
        RewardEndpointConfig,
        RewardModelConfig,
        RewardModelSettings,
        RewardSource,
        RunConfig,
        SFTConfig,
        SFTSettings,
    )
    from ppo_engine.training.ppo import PPOTrainer
    from ppo_engine.training.reward import RewardModelTrainer
    from ppo_engine.training.sft import SFTTrainer

# Loaded when first asked for: torch and transformers take seconds, and `ppo-engine --help` needs
# neither.
_SETTINGS = (
    "AdaptiveKLConfig",
    "DemonstrationDataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOSettings",
    "PreferenceDataConfig",
    "PromptDataConfig",
    "RewardConfig",
    "RewardEndpointConfig",
    "RewardModelConfig",
    "RewardModelSettings",
    "RewardSource",
    "RunConfig",
    "SFTConfig",
    "SFTSettings",
)
_HOMES = {
    "Experience": "ppo.experience",
    "PPOEngine": "ppo.engine",
    "PPOTrainer": "training.ppo",
    "RewardModelTrainer": "training.reward",
    "Rollout": "rollout.batch",
    "SFTTrainer": "training.sft",
    "UserError": "errors",
    "value_model_class": "pretrained.classifier",
    **dict.fromkeys(_SETTINGS, "settings.schema"),
}

__all__ = [
    "AdaptiveKLConfig",
    "DemonstrationDataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "Experience",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOEngine",
    "PPOSettings",
    "PPOTrainer",
    "PreferenceDataConfig",
    "PromptDataConfig",
    "RewardConfig",
    "RewardEndpointConfig",
    "RewardModelConfig",
    "RewardModelSettings",
    "RewardModelTrainer",
    "RewardSource",
    "Rollout",
    "RunConfig",
    "SFTConfig",
    "SFTSettings",
    "SFTTrainer",
    "UserError",
    "value_model_class",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ppo_engine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ppo_engine.{_HOMES[name]}"), name)

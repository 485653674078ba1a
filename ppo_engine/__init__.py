"""RLHF on one machine: supervised fine-tuning, reward models from ranked answers, and PPO.

    from ppo_engine import PPOConfig, PPOTrainer
    PPOTrainer("path/to/model", reward=my_function, prompts=["…"], config=PPOConfig()).train()

`GRPOConfig()` in its place trains with GRPO. `PPOEngine` gives the four calls of a PPO step to a
training loop of your own.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_engine.errors import UserError
    from ppo_engine.ppo.engine import PPOEngine
    from ppo_engine.ppo.experience import Experience
    from ppo_engine.pretrained.classifier import value_model_class
    from ppo_engine.rollout.batch import Rollout
    from ppo_engine.settings.schema import (
        AdaptiveKLConfig,
        DemoConfig,
        DemonstrationDataConfig,
        EnvironmentConfig,
        EvaluationConfig,
        GenerateConfig,
        GenerationConfig,
        GRPOConfig,
        GRPOSettings,
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
        ScoringConfig,
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
    "DemoConfig",
    "DemonstrationDataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "GRPOSettings",
    "GenerateConfig",
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
    "ScoringConfig",
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
    "DemoConfig",
    "DemonstrationDataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "Experience",
    "GRPOConfig",
    "GRPOSettings",
    "GenerateConfig",
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
    "ScoringConfig",
    "UserError",
    "value_model_class",
]


if not TYPE_CHECKING:  # type checkers would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"ppo_engine.{_HOMES[name]}"), name)
        near = difflib.get_close_matches(name, __all__, n=1, cutoff=0.75)
        message = f"ppo_engine has no {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
        # `from ppo_engine import …` asks here first, then for a module, and forgets the message
        # of an AttributeError, which everything else expects. Who asks is seen by the frame alone;
        # Python 3.12 finds near names in `__dir__` by itself.
        imports = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        if imports and near and importlib.util.find_spec(f"ppo_engine.{name}") is None:
            raise ImportError(message, name=name)
        raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Every setting of a run: frozen dataclasses, validated when they are made.

One tree per command (`SFTConfig`, `RewardModelConfig`, `PPOConfig`). The same names serve Python
(`PPOConfig(ppo=PPOSettings(kl_coef=0.02))`), YAML files and dotted overrides on the command line
(`ppo.kl_coef=0.02`); `settings.files` reads and writes them. The docstring below a field is its one
description, with units; `settings.describe` shows it wherever people look.
"""

from ppo_engine.settings.schema.base import settings_of
from ppo_engine.settings.schema.commands import (
    COMMANDS,
    DemoConfig,
    GenerateConfig,
    GRPOConfig,
    PPOConfig,
    RewardModelConfig,
    RewardModelSettings,
    SFTConfig,
    SFTSettings,
)
from ppo_engine.settings.schema.data import (
    DemonstrationDataConfig,
    PreferenceDataConfig,
    PromptDataConfig,
)
from ppo_engine.settings.schema.derived import (
    LEARNING_RATES,
    derived,
    following,
    resolved,
    with_value,
)
from ppo_engine.settings.schema.models import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RewardEndpointConfig,
    RewardSource,
    ScoringConfig,
)
from ppo_engine.settings.schema.ppo import (
    AdaptiveKLConfig,
    EnvironmentConfig,
    GenerationConfig,
    GRPOSettings,
    PPOSettings,
)
from ppo_engine.settings.schema.run import EvaluationConfig, RunConfig

__all__ = [
    "COMMANDS",
    "LEARNING_RATES",
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
    "derived",
    "following",
    "resolved",
    "settings_of",
    "with_value",
]

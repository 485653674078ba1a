"""The settings of each command and its trainer: a tree of sections."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field

from ppo_engine.settings.schema.base import NonNegativeFloat, PositiveInt, Seed, settings
from ppo_engine.settings.schema.data import (
    DemonstrationDataConfig,
    PreferenceDataConfig,
    PromptDataConfig,
)
from ppo_engine.settings.schema.models import ModelConfig, RewardConfig, ScoringConfig
from ppo_engine.settings.schema.ppo import (
    EnvironmentConfig,
    GenerationConfig,
    GRPOSettings,
    PPOSettings,
)
from ppo_engine.settings.schema.run import EvaluationConfig, RunConfig


@settings
class PPOConfig:
    """`ppo-engine ppo` and `PPOTrainer`.

    A section is one of the classes below, which type checkers know, or a dictionary of its keys:
    `PPOConfig(generation={"max_new_tokens": 16})`.
    """

    policy: ModelConfig = Field(default_factory=ModelConfig)
    """The model that writes the responses."""
    reward: RewardConfig = Field(default_factory=RewardConfig)
    """What scores them."""
    critic: ModelConfig = Field(default_factory=ModelConfig)
    """The model that predicts the reward, for the estimators that have one."""
    data: PromptDataConfig = Field(default_factory=PromptDataConfig)
    """The prompts."""
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    """How responses are sampled."""
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    """What answers the policy in conversations of several turns."""
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    """The algorithm."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Held-out prompts."""
    run: RunConfig = Field(default_factory=RunConfig)
    """Where results go, and what makes the run repeatable."""
    steps: PositiveInt = 100
    """Rollout batches to learn from, one a step."""
    share_base: bool = False
    """Hold the base weights once: policy, critic and reward model are adapters and heads on them,
    the bare base is the reference. Needs policy.lora, and a reward model that is saved as adapters
    of the same base (run.save_adapters), or another kind of reward. Unset, critic.lora and
    critic.trainable_layers are then the policy's; from a reward model, the critic goes on with
    its adapters."""
    profile: bool = False
    """Profile the second step: a table of its phases, and a trace."""


@settings
class GRPOConfig(PPOConfig):
    """`ppo-engine grpo`, and `PPOTrainer` with groups of responses and no critic."""

    ppo: GRPOSettings = Field(default_factory=GRPOSettings)


@settings
class RewardModelSettings:
    """Bradley-Terry training of the reward model."""

    batch_size: PositiveInt = 16
    """Pairs or rankings per optimizer step."""
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens in a forward pass; memory only, not the result. auto: as many as make it fast, or fit
    into the memory that is free."""
    micro_batch_size: PositiveInt | None = None
    """Pairs or rankings per forward pass, at most; null: as micro_batch_tokens says."""
    epochs: PositiveInt = 1
    """Times that all data are read."""
    center_coef: NonNegativeFloat = 0.0
    """Weight of a term that keeps a pair's scores around 0; not defined for longer rankings."""


@settings
class RewardModelConfig:
    """`ppo-engine reward` and `RewardModelTrainer`."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model that becomes the reward model."""
    data: PreferenceDataConfig = Field(default_factory=PreferenceDataConfig)
    """Preferences to learn from."""
    reward: RewardModelSettings = Field(default_factory=RewardModelSettings)
    """How it is trained."""
    run: RunConfig = Field(default_factory=RunConfig)
    """Where results go, and what makes the run repeatable."""


@settings
class SFTSettings:
    """Supervised fine-tuning: the negative log-likelihood of response tokens."""

    batch_size: PositiveInt = 16
    """Examples per optimizer step."""
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens in a forward pass; memory only, not the result. auto: as many as make it fast, or fit
    into the memory that is free."""
    micro_batch_size: PositiveInt | None = None
    """Examples per forward pass, at most; null: as micro_batch_tokens says."""
    epochs: PositiveInt = 1
    """Times that all data are read."""


@settings
class SFTConfig:
    """`ppo-engine sft` and `SFTTrainer`."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model that is fine-tuned."""
    data: DemonstrationDataConfig = Field(default_factory=DemonstrationDataConfig)
    """Examples to learn from."""
    sft: SFTSettings = Field(default_factory=SFTSettings)
    """How it is trained."""
    run: RunConfig = Field(default_factory=RunConfig)
    """Where results go, and what makes the run repeatable."""


@settings
class GenerateConfig:
    """What `ppo-engine generate` takes: prompts from `data.path`, or the one in `prompt`."""

    model: str = ""
    """Hugging Face name or folder."""
    trust_remote_code: bool = False
    """Run Python files that come with the model, which may do anything on this machine: only where
    you have read them."""
    prompt: str = ""
    """One prompt, in place of data.path; chat models get it as the user's message."""
    data: PromptDataConfig = Field(default_factory=PromptDataConfig)
    """Prompts from a file."""
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    """How responses are sampled."""
    responses: PositiveInt = 1
    """To each prompt."""
    batch_size: PositiveInt = 16
    """Responses sampled at a time."""
    reward: ScoringConfig = Field(default_factory=ScoringConfig)
    """What scores the responses; by default nothing."""
    output: str = ""
    """A file; empty writes to standard output."""
    resume: bool = False
    """Go on with the rows in output.partial, which a failure left there."""
    seed: Seed = 0
    """Of what is drawn."""
    date: datetime.date | None = None
    """For chat templates that show the date (YYYY-MM-DD); null: today."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and compute; auto: bfloat16 where the device multiplies it faster."""


@settings
class DemoConfig:
    """`ppo-engine demo`."""

    model: str = ""
    """Hugging Face name or folder; empty is the embedded SmolLM2-135M-Instruct."""
    algorithm: Literal["ppo", "grpo"] = "ppo"
    """Of the last stage."""
    share_base: bool = False
    """Train adapters on one base in place of the upper layers of models of their own."""
    smoke: bool = False
    """Every stage with a tiny random model, within a minute."""
    output_dir: str = ""
    """A new folder for the results; empty: runs/demo-TIME."""
    seed: Seed = 0
    """Of everything that is drawn."""


COMMANDS = {
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "reward": RewardModelConfig,
    "sft": SFTConfig,
    "generate": GenerateConfig,
    "demo": DemoConfig,
}

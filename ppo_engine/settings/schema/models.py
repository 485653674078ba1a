"""Settings of models that are trained, and of what scores a response."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field

from ppo_engine.settings.schema.base import (
    Derived,
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    settings,
)


@settings
class OptimizerConfig:
    """AdamW over fp32 weights, or the fp32 masters of bf16 ones."""

    learning_rate: Derived[PositiveFloat] = cast(Any, None)
    """Of the first step after the warm-up. null: by what is trained, and whether by LoRA; see
    the table in docs/settings.md."""
    weight_decay: NonNegativeFloat = 0.0
    """Share of a weight that each step takes away, times the learning rate; biases and norms are
    not decayed."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay per step of the mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay per step of the mean of squared gradients."""
    eps: PositiveFloat = 1e-5
    """Added to the root of the mean of squared gradients; 1e-5 as in Huang et al. 2022."""
    moments: Literal["float32", "8bit"] = "float32"
    """How both means are kept; 8bit takes 2 bytes a weight in place of 8, and is meant for a beta2
    of up to 0.99 or so (see `ppo_kernels.adamw`)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to 0 over the run's optimizer steps, after the warm-up; constant:
    it does not."""
    warmup_fraction: Fraction = 0.03
    """Share of the run's optimizer steps in which the learning rate rises: without it, Adam's first
    step moves every weight by all of it. 0.03 as in OpenRLHF."""
    max_grad_norm: PositiveFloat = 1.0
    """A longer gradient, over all weights of the model, is scaled down to this norm."""


@settings
class LoraConfig:
    """Low-rank adapters (optional group `lora`); the reference is then the policy without them."""

    rank: PositiveInt = 16
    """Columns of an adapter's matrices."""
    alpha: PositiveInt = 32
    """What an adapter adds is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters; all-linear is every linear layer but the head."""


@settings
class ModelConfig:
    """A model that is trained: the policy, the critic, or the reward model in its own training."""

    path: str = ""
    """Hugging Face name or folder. An empty critic path: start from the reward model, or from the
    policy where rewards do not come from a model."""
    trust_remote_code: bool = False
    """Run Python files that come with the model, which may do anything on this machine: only where
    you have read them."""
    trainable_layers: NonNegativeInt | None = None
    """Train the last N decoder layers; null trains all. With lora: those get adapters."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the weights; null trains the weights."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Of the frozen base under lora (optional group `quant`); needs path. null: none."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations a second time in the backward pass in place of keeping them: less memory,
    more time. auto: where a run would not fit without, by the estimate of --dry-run; in a loop of
    your own, never."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """How it is trained."""


@settings
class RewardSource:
    """One reward: one of path, function and url."""

    path: str | None = None
    """A reward model's folder or name."""
    function: str | None = None
    """A Python function: "file.py:name", "package.module:name", or the name of a ready one; see
    docs/rewards.md."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the function, by the names of its parameters."""
    url: str | None = None
    """An endpoint, http:// or https://; see docs/rewards.md."""
    name: str = ""
    """What metrics call it; empty: the folder's, the function's or the host's name."""


@settings
class RewardEndpointConfig:
    """How HTTP endpoints are called."""

    timeout: PositiveFloat = 60.0
    """Seconds for a request until its whole answer is there, with further attempts and the waits
    before them."""
    batch_size: PositiveInt | None = None
    """Responses per request; null sends all in one."""
    token_env: str | None = None
    """Environment variable with a token, sent as `Authorization: Bearer …`; null: none. The token
    itself is written nowhere."""


@settings
class ScoringConfig:
    """What scores a response: one of path, function and url, or several rewards in `sources`."""

    path: str | None = None
    """A reward model's folder or name."""
    function: str | None = None
    """A Python function: "file.py:name", "package.module:name", or the name of a ready one; see
    docs/rewards.md."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the function, by the names of its parameters."""
    url: str | None = None
    """An endpoint, http:// or https://; see docs/rewards.md."""
    sources: list[RewardSource] = Field(default_factory=list)
    """Several rewards, in place of path, function and url."""
    trust_remote_code: bool = False
    """Run Python files that come with a reward model, or with any of several, which may do anything
    on this machine: only where you have read them."""
    weights: list[FiniteFloat] | None = None
    """Of the rewards in their order; null: 1 each."""
    http: RewardEndpointConfig = Field(default_factory=RewardEndpointConfig)
    """How endpoints are called."""


@settings
class RewardConfig(ScoringConfig):
    """What scores a response in training, and what becomes of the score (see `rewards.shaping`)."""

    normalize: bool = False
    """Shift and scale scores to mean 0 and deviation 1 of the first rollouts."""
    missing_eos_score: FiniteFloat | None = None
    """Replaces the score of a response that was cut off before its end; null: the score stays."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score of a response that was cut off; instead of missing_eos_score."""
    length_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score for each token beyond length_penalty_from."""
    length_penalty_from: NonNegativeInt = 0
    """Tokens of a response that cost no length_penalty."""

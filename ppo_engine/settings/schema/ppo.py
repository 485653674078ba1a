"""Settings of PPO and its relatives: how responses are sampled, and what is learnt from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import Field

from ppo_engine.settings.schema.base import (
    FITS_FLOAT,
    Derived,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    settings,
)

Estimator: TypeAlias = Literal[
    "gae", "monte_carlo", "td", "grpo", "dr_grpo", "rloo", "reinforce_pp", "remax"
]
KLPlace: TypeAlias = Literal["reward", "loss"]


@settings
class GenerationConfig:
    """How responses are sampled; log-probs everywhere use the same temperature."""

    max_new_tokens: PositiveInt = 128
    """Tokens of the longest response, or turn of the policy; longer ones are cut off."""
    temperature: Annotated[float, Field(ge=1e-6, allow_inf_nan=False), FITS_FLOAT] = 1.0
    """Logits are divided by it."""
    top_k: NonNegativeInt = 0
    """Draw from this many most likely tokens; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest tokens that have this share of the probability; 1: from all."""
    min_new_tokens: NonNegativeInt = 0
    """Tokens of a turn before one that ends it can be drawn; a stop string may come sooner."""
    stop: tuple[Annotated[str, Field(min_length=1)] | NonNegativeInt, ...] = ()
    """Strings, or token ids, at which a turn ends besides the model's own ends; they belong to
    it."""
    kv_cache_gib: PositiveFloat | None = None
    """GiB for keys and values while responses are sampled; rows that do not fit wait for others to
    end. null: half of the memory that is free."""

    @property
    def samples_all(self) -> bool:
        """Whether tokens are drawn from the very distribution whose log-probs are trained."""
        return not (self.top_k or self.top_p < 1 or self.min_new_tokens)


@settings
class EnvironmentConfig:
    """What answers the policy in multi-turn conversations; without a function, nothing."""

    function: str | None = None
    """A Python function: "file.py:name" or "package.module:name", see `rollout.environment`. null:
    responses have a single turn."""
    max_turns: PositiveInt = 4
    """Turns of the policy, each of at most generation.max_new_tokens."""


@settings
class AdaptiveKLConfig:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, section 2.2)."""

    target: PositiveFloat = 6.0
    """KL to the reference that it aims at, nats a response."""
    horizon: PositiveInt = 10_000
    """Responses over which the coefficient changes by at most 20 %."""


@settings
class PPOSettings:
    """The algorithm (Schulman et al. 2017; Ouyang et al. 2022) and its relatives.

    The module `estimators` says what each one is; those without a critic use no value setting. The
    losses are those of `ppo_kernels.ppo_policy_loss`. "The source's own" is what the estimator's
    paper uses.
    """

    estimator: Estimator = "gae"
    """Where advantages come from: a critic (gae, monte_carlo, td), the other responses to the
    prompt (grpo, dr_grpo, rloo), the batch (reinforce_pp), or the greedy response (remax)."""
    group_size: PositiveInt = 1
    """Responses to each prompt."""
    rollout_batch_size: PositiveInt = 64
    """Responses per step; rollout_batch_size / group_size prompts."""
    mini_batch_size: PositiveInt = 32
    """Responses per optimizer step."""
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens of prompts and responses in a forward pass; memory only, not the result. auto: as
    many as make it fast, or fit into the memory that is free."""
    micro_batch_size: PositiveInt | None = None
    """Responses per forward pass, at most; null: as micro_batch_tokens says."""
    epochs: PositiveInt = 1
    """Times that each step learns from its responses."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Of gae: 0 trusts the critic alone (td), 1 the rewards alone (monte_carlo)."""
    whiten_advantages: Derived[bool] = cast(Any, None)
    """Shift and scale the step's advantages to mean 0 and deviation 1. null: the source's own,
    true with a critic and for reinforce_pp."""
    whiten_rewards: bool = False
    """Scale the step's per-token rewards to deviation 1; they are not shifted."""

    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL to the reference, reward per nat; 0: the KL is only measured on held-out
    prompts."""
    kl_in: KLPlace = "reward"
    """Subtract the KL from each token's reward, or add it to the loss."""
    kl_estimator: Derived[Literal["k1", "k2", "k3"]] = cast(Any, None)
    """How a token's KL is estimated (Schulman 2020): log ratio, half its square, or the one that is
    never negative. null: k1 in the reward, k3 in the loss."""
    adaptive_kl: AdaptiveKLConfig | None = None
    """Change kl_coef so that the KL stays near a target; null: kl_coef stays."""

    stop_at_kl: PositiveFloat | None = None
    """The run ends with an error where the KL to the reference, nats a response, is above; null:
    never."""
    stop_at_entropy: NonNegativeFloat | None = None
    """The same where the policy's entropy, nats a token, is below."""

    objective: Literal["clip", "cispo"] = "clip"
    """PPO's clipped surrogate, or CISPO's clipped weights, with which every token has a
    gradient."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Whose ratio of new to old probability is clipped. "sequence" is GSPO, whose ratios stay so
    near 1 that its clip_range is some 3e-4."""
    clip_range: (
        Annotated[float, Field(gt=0, lt=1)]
        | tuple[Annotated[float, Field(ge=0, le=1)], PositiveFloat]
    ) = 0.2
    """How far the ratio counts beyond 1: one number, or [low, high] ("clip-higher")."""
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Bound of the ratio where the advantage is negative; null: none."""
    reduction: Derived[Literal["token_mean", "sequence_mean", "sum"]] = cast(Any, None)
    """Mean of tokens, mean of responses' means, or a sum over a constant (responses times
    generation.max_new_tokens). null: the source's own, token_mean but for grpo (sequence_mean) and
    dr_grpo (sum)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the policy's entropy (nats a token), which is maximized."""
    old_logprobs: Literal["auto", "sampler", "recompute"] = "auto"
    """Whose log-probs the ratio starts from: the sampler's own, which cost nothing, or those of a
    pass over what it wrote; auto takes the sampler's if on the first rollout they differ by less
    than 0.02 nats a token (rollout/logprob_diff), and no pass of their own where a rollout is one
    optimizer step with the KL in the loss."""
    importance_cap: PositiveFloat | None = None
    """Weight tokens by min(pi_old / pi_sampler, cap) where the sampler's log-probs, recorded in
    `Rollout.logprobs`, differ from the trainer's; null: no weights."""

    value_clip_range: PositiveFloat | None = 0.2
    """How far a new value may move from the old one before the critic's loss ignores it, in units
    of the reward; null: as far as it likes."""
    critic_warmup_steps: NonNegativeInt = 0
    """First steps, which train only the critic."""

    @property
    def has_critic(self) -> bool:
        return self.estimator in ("gae", "monte_carlo", "td")

    @property
    def uses_kl(self) -> bool:
        """Whether the KL to the reference is part of the reward or the loss."""
        return self.kl_coef > 0

    @property
    def compares_groups(self) -> bool:
        """Whether a response's advantage comes from the others to the same prompt."""
        return self.estimator in ("grpo", "dr_grpo", "rloo")

    @property
    def needs_greedy(self) -> bool:
        """Whether it comes from the greedy response to the same prompt."""
        return self.estimator == "remax"


@settings
class GRPOSettings(PPOSettings):
    """PPOSettings with the defaults of GRPO, those of Shao et al. 2024 (arXiv:2402.03300, section
    4.2), but for smaller groups."""

    estimator: Estimator = "grpo"
    group_size: PositiveInt = 8
    kl_coef: NonNegativeFloat = 0.04
    kl_in: KLPlace = "loss"

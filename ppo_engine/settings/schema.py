"""Every setting of a run: frozen dataclasses, validated when they are made.

One tree per command (`SFTConfig`, `RewardModelConfig`, `PPOConfig`). The same names serve Python
(`PPOConfig(ppo=PPOSettings(kl_coef=0.02))`), YAML files and dotted overrides on the command line
(`ppo.kl_coef=0.02`); `settings.files` reads and writes them.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
# Variables of the chat template, such as {enable_thinking: false}, wherever it is rendered.
ChatTemplateArguments = dict[str, Any]

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def _settings(cls: type[T]) -> type[T]:
    """A frozen dataclass that validates its fields and refuses unknown ones."""
    return cast(type[T], dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls))


@_settings
class OptimizerConfig:
    """AdamW over fp32 weights, or the fp32 masters of bf16 ones; the learning rate decays to zero
    over the run unless constant."""

    learning_rate: PositiveFloat = 1e-5
    weight_decay: NonNegativeFloat = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-5
    # 8bit takes 2 bytes a weight in place of 8; meant for a beta2 of up to 0.99 or so, see
    # `ppo_kernels.adamw`.
    moments: Literal["float32", "8bit"] = "float32"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: Fraction = 0.0
    max_grad_norm: PositiveFloat = 1.0


@_settings
class LoraConfig:
    """Low-rank adapters (optional group `lora`); the reference is then the policy without them."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    target_modules: str | list[str] = "all-linear"


@_settings
class ModelConfig:
    """A model that is trained: the policy, the critic, or the reward model in its own training.

    An empty critic path means: start from the reward model, or from the policy where rewards come
    from a function.
    """

    path: str = ""
    trainable_layers: NonNegativeInt | None = None  # the last N decoder layers; None trains all
    lora: LoraConfig | None = None
    quantization: Literal["8bit", "4bit"] | None = None  # of the frozen base under lora; needs path
    gradient_checkpointing: bool = False
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)


@_settings
class RewardSource:
    """One reward: a reward model, a Python function or an HTTP endpoint."""

    path: str | None = None  # a reward model's folder or name
    function: str | None = None  # "file.py:name" or "package.module:name"
    url: str | None = None  # http:// or https://, see `rewards.http`
    name: str = ""  # in metrics; empty: the folder's, the function's or the host's


@_settings
class RewardEndpointConfig:
    """How HTTP endpoints are called."""

    timeout: PositiveFloat = 60.0  # seconds to wait for an answer
    batch_size: PositiveInt | None = None  # responses per request; None sends all in one


@_settings
class ScoringConfig:
    """What scores a response: one of path, function and url, or several rewards in `sources`."""

    path: str | None = None
    function: str | None = None
    url: str | None = None
    sources: list[RewardSource] = Field(default_factory=list)
    weights: list[FiniteFloat] | None = None  # of the rewards in their order; None: 1 each
    http: RewardEndpointConfig = Field(default_factory=RewardEndpointConfig)


@_settings
class RewardConfig(ScoringConfig):
    """What scores a response in training, and what becomes of the score (see `rewards.shaping`)."""

    normalize: bool = False  # shift and scale scores to mean 0, deviation 1 on the first rollouts
    missing_eos_score: FiniteFloat | None = None  # replaces the score of an unfinished response
    missing_eos_penalty: NonNegativeFloat = 0.0  # or is subtracted from it
    length_penalty: NonNegativeFloat = 0.0  # subtracted from the score for each token …
    length_penalty_from: NonNegativeInt = 0  # … beyond this many


@_settings
class PromptDataConfig:
    """JSONL of prompts, text or chat messages; other columns reach the reward. What rows may be:
    docs/dataset.md."""

    path: str = ""
    as_chat: bool = False  # text prompts become a user's message, which the chat template wraps
    max_prompt_tokens: PositiveInt = 1024
    columns: dict[str, str] = Field(default_factory=dict)  # ours: the file's, {prompt: question}
    system_prompt: str = ""  # first message of every chat that has no system message; text, too
    on_bad_line: Literal["error", "skip"] = "error"
    chat_template_kwargs: ChatTemplateArguments = Field(default_factory=dict)


@_settings
class GenerationConfig:
    """How responses are sampled; log-probs everywhere use the same temperature."""

    max_new_tokens: PositiveInt = 128
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Of a turn, before a token that ends it can be drawn; a stop string may come sooner.
    min_new_tokens: NonNegativeInt = 0
    # Strings, or token ids, at which a turn ends besides the model's own ends; they belong to it.
    stop: tuple[Annotated[str, Field(min_length=1)] | NonNegativeInt, ...] = ()
    # For keys and values while responses are sampled; by default half of the memory that is free.
    # Rows that do not fit wait for others to end.
    kv_cache_gib: PositiveFloat | None = None


@_settings
class AdaptiveKLConfig:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, section 2.2)."""

    target: PositiveFloat = 6.0
    horizon: PositiveInt = 10_000


@_settings
class EnvironmentConfig:
    """What answers the policy in multi-turn conversations; without a function, nothing."""

    function: str | None = (
        None  # "file.py:name" or "package.module:name"; see `rollout.environment`
    )
    max_turns: PositiveInt = 4  # of the policy, each of at most generation.max_new_tokens


@_settings
class PPOSettings:
    """The algorithm (Schulman et al. 2017; Ouyang et al. 2022) and its relatives.

    The module `estimators` says what each one is; those without a critic use no value setting. The
    losses are those of `ppo_kernels.ppo_policy_loss`. "The source's own" defaults to what the
    estimator's paper uses.
    """

    estimator: Literal[
        "gae", "monte_carlo", "td", "grpo", "dr_grpo", "rloo", "reinforce_pp", "remax"
    ] = "gae"
    group_size: PositiveInt = 1  # responses to each prompt
    rollout_batch_size: PositiveInt = 64  # responses per step
    mini_batch_size: PositiveInt = 32  # responses per optimizer step
    # Of prompts and responses, in a forward pass; memory only, not the result. By default as many
    # as make it fast, or fit into the memory that is free.
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    micro_batch_size: PositiveInt | None = None  # responses per forward pass, at most
    epochs: PositiveInt = 1
    gamma: Fraction = 1.0
    lam: Fraction = 0.95  # of gae
    whiten_advantages: bool = cast(Any, None)  # the source's own
    whiten_rewards: bool = False

    kl_coef: NonNegativeFloat = 0.05
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = cast(Any, None)  # k1 in the reward, k3 in the loss
    adaptive_kl: AdaptiveKLConfig | None = None

    objective: Literal["clip", "cispo"] = "clip"
    # "sequence" is GSPO, whose ratios stay so near 1 that its clip_range is some 3e-4.
    ratio_level: Literal["token", "sequence"] = "token"
    clip_range: (
        Annotated[float, Field(gt=0, lt=1)]
        | tuple[Annotated[float, Field(ge=0, le=1)], PositiveFloat]  # (low, high): "clip-higher"
    ) = 0.2
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    # The source's own. "sum" is over a constant, responses times generation.max_new_tokens.
    reduction: Literal["token_mean", "sequence_mean", "sum"] = cast(Any, None)
    entropy_coef: NonNegativeFloat = 0.0
    # Whose log-probs the ratio starts from: the sampler's own, which cost nothing, or those of a
    # pass over what it wrote; auto takes the sampler's if on the first rollout they differ by less
    # than 0.02 nats a token (rollout/logprob_diff).
    old_logprobs: Literal["auto", "sampler", "recompute"] = "auto"
    # Weight tokens by min(pi_old / pi_sampler, cap) where the sampler's log-probs, recorded in
    # `Rollout.logprobs`, differ from the trainer's.
    importance_cap: PositiveFloat | None = None

    value_clip_range: PositiveFloat | None = 0.2
    critic_warmup_steps: NonNegativeInt = 0  # first steps, which train only the critic

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

    def __post_init__(self) -> None:
        reductions = {"grpo": "sequence_mean", "dr_grpo": "sum"}
        own = {
            "whiten_advantages": self.has_critic or self.estimator == "reinforce_pp",
            "kl_estimator": "k1" if self.kl_in == "reward" else "k3",
            "reduction": reductions.get(self.estimator, "token_mean"),
        }
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


# What `ppo-engine grpo` starts from: as in Shao et al. 2024 (arXiv:2402.03300, section 4.2), in
# smaller groups.
GRPO_DEFAULTS: dict[str, Any] = {
    "ppo": {
        "estimator": "grpo",
        "group_size": 8,
        "kl_in": "loss",
        "kl_coef": 0.04,
    }
}


@_settings
class EvaluationConfig:
    """Held-out prompts, answered before training, after every `every` steps and at the end.

    They come from a file of their own, or are taken out of the training data; none by default.
    """

    path: str | None = None  # as data.path
    prompts: NonNegativeInt = 0  # or this many distinct prompts of the training data
    every: NonNegativeInt = 0  # steps; 0 is before training and at the end only
    best_of: PositiveInt = 1  # responses to each; with N > 1 the expected best of N is measured too
    patience: PositiveInt | None = None  # stop after this many in a row without a new best
    keep_best: bool = True  # the policy with the best score so far, in best/
    # The best by eval/shaped_scores, with missing-EOS rule and length penalty; by eval/scores
    # where there is neither, or the scale of the shaped ones changes (reward.normalize).


@_settings
class RunConfig:
    """What every training command has: where results go, and what makes a run repeatable."""

    output_dir: str = ""
    seed: int = 0
    date: datetime.date | None = None  # for chat templates that show it; None: the day it began
    device: str = "auto"
    # Of weights and compute. In bfloat16, what is trained has the rest of an fp32 master beside it.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Of saved models; auto: the dtype they came in. Checkpoints to resume from keep every bit.
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    resume: bool = False  # continue from the newest checkpoint in output_dir
    checkpoint_every: NonNegativeInt = 0  # steps; 0 writes only the final one, or a failure's
    checkpoint_minutes: NonNegativeFloat = 30.0  # since the last one; 0: by steps alone
    sample_every: NonNegativeInt = 5  # steps between printed sample responses
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)


@_settings
class PPOConfig:
    """`ppo-engine ppo` and `PPOTrainer`."""

    policy: ModelConfig = Field(default_factory=ModelConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    critic: ModelConfig = Field(default_factory=ModelConfig)
    data: PromptDataConfig = Field(default_factory=PromptDataConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    steps: PositiveInt = 100  # rollout batches
    profile: bool = False  # the second step: a table of its phases, and a trace


@_settings
class PreferenceDataConfig:
    """JSONL of preference pairs or rankings; a share of the prompts is held out to measure
    accuracy."""

    path: str = ""
    eval_path: str | None = None  # instead of holding out a share
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_tokens: PositiveInt = 1024  # prompt and response together; the prompt is truncated first
    max_pairs: PositiveInt | None = None  # a sample of the data; rankings of K have up to K(K-1)/2
    as_chat: bool = False  # text becomes a user's and the assistant's message
    columns: dict[str, str] = Field(default_factory=dict)  # ours: the file's, {prompt: question}
    system_prompt: str = ""  # first message of every chat that has no system message; text, too
    on_bad_line: Literal["error", "skip"] = "error"
    chat_template_kwargs: ChatTemplateArguments = Field(default_factory=dict)


@_settings
class RewardModelSettings:
    """Bradley-Terry training of the reward model."""

    batch_size: PositiveInt = 16  # pairs or rankings per optimizer step
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"  # per forward pass; memory only
    micro_batch_size: PositiveInt | None = None  # pairs or rankings per forward pass, at most
    epochs: PositiveInt = 1
    center_coef: NonNegativeFloat = 0.0  # of pairs' scores; not defined for longer rankings


@_settings
class RewardModelConfig:
    """`ppo-engine reward` and `RewardModelTrainer`."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: PreferenceDataConfig = Field(default_factory=PreferenceDataConfig)
    reward: RewardModelSettings = Field(default_factory=RewardModelSettings)
    run: RunConfig = Field(default_factory=RunConfig)


@_settings
class DemonstrationDataConfig:
    """JSONL of prompts with responses, or of chat messages; a share of the prompts is held out."""

    path: str = ""
    eval_path: str | None = None  # instead of holding out a share
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_tokens: Annotated[int, Field(ge=2)] = 1024  # per example; longer ones are truncated
    as_chat: bool = False  # text becomes a user's and the assistant's message
    columns: dict[str, str] = Field(default_factory=dict)  # ours: the file's, {prompt: question}
    system_prompt: str = ""  # first message of every chat that has no system message; text, too
    on_bad_line: Literal["error", "skip"] = "error"
    chat_template_kwargs: ChatTemplateArguments = Field(default_factory=dict)


@_settings
class SFTSettings:
    """Supervised fine-tuning: the negative log-likelihood of response tokens."""

    batch_size: PositiveInt = 16  # examples per optimizer step
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"  # per forward pass; memory only
    micro_batch_size: PositiveInt | None = None  # examples per forward pass, at most
    epochs: PositiveInt = 1


@_settings
class SFTConfig:
    """`ppo-engine sft` and `SFTTrainer`."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DemonstrationDataConfig = Field(default_factory=DemonstrationDataConfig)
    sft: SFTSettings = Field(default_factory=SFTSettings)
    run: RunConfig = Field(default_factory=RunConfig)


@_settings
class GenerateConfig:
    """What `ppo-engine generate` takes: prompts from `data.path`, or the one in `prompt`."""

    model: str = ""
    prompt: str = ""  # a question; chat models get it as the user's message
    data: PromptDataConfig = Field(default_factory=PromptDataConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    responses: PositiveInt = 1  # to each prompt
    batch_size: PositiveInt = 16  # responses sampled at a time
    reward: ScoringConfig = Field(default_factory=ScoringConfig)  # none: responses get no scores
    output: str = ""  # a file; empty writes to standard output
    resume: bool = False  # go on with the rows in output.partial, which a failure left there
    seed: int = 0
    date: datetime.date | None = None  # today, for chat templates that show it
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@_settings
class DemoConfig:
    """`ppo-engine demo`."""

    model: str = ""  # Hugging Face name or folder; empty is the embedded SmolLM2-135M-Instruct
    algorithm: Literal["ppo", "grpo"] = "ppo"  # for the last stage
    smoke: bool = False  # every stage with a tiny random model, within a minute
    output_dir: str = ""
    seed: int = 0

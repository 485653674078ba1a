"""Settings that contradict each other, of a PPO run and of `ppo-engine generate`; `schema` refuses
what is wrong by itself."""

from __future__ import annotations

from ppo_engine.errors import UserError
from ppo_engine.settings.schema import (
    EvaluationConfig,
    GenerateConfig,
    GenerationConfig,
    PPOConfig,
)


def check_settings(config: PPOConfig) -> None:
    """Raise a `UserError` for settings that contradict each other, or would have no effect."""
    _check_evaluation(config.evaluation)
    check_generation(config.generation)
    if config.share_base:
        _check_shared_base(config)
    if config.reward.missing_eos_score is not None and config.reward.missing_eos_penalty:
        raise UserError(
            "reward.missing_eos_penalty would have no effect: reward.missing_eos_score replaces "
            "the score of an unfinished response. Set one of them."
        )
    settings = config.ppo
    name = f"ppo.estimator={settings.estimator}"
    if settings.compares_groups and settings.group_size < 2:
        raise UserError(
            f"{name} compares responses to the same prompt: set ppo.group_size to 2 or more."
        )
    if settings.rollout_batch_size % settings.group_size:
        raise UserError(
            f"ppo.rollout_batch_size={settings.rollout_batch_size} is not a multiple of "
            f"ppo.group_size={settings.group_size}: a step needs complete groups."
        )
    if settings.gamma != 1 and (settings.compares_groups or settings.needs_greedy):
        raise UserError(
            f"{name} compares whole responses and has no discount: leave ppo.gamma at 1."
        )
    if settings.compares_groups and settings.whiten_rewards:
        raise UserError(
            f"ppo.whiten_rewards scales per-token rewards, and {name} has none: leave it unset."
        )
    if settings.critic_warmup_steps and not settings.has_critic:
        raise UserError(f"{name} has no critic: leave ppo.critic_warmup_steps at 0.")
    if settings.kl_in == "loss" and settings.kl_estimator == "k1":
        raise UserError(
            "ppo.kl_estimator=k1 in the loss is no penalty: the mean of its gradient is 0. Use k2 "
            "or k3, or ppo.kl_in=reward."
        )
    if settings.stop_at_kl is not None and settings.kl_coef == 0:
        raise UserError(
            "ppo.stop_at_kl looks at the KL of every step, which is not measured with "
            "ppo.kl_coef=0: set this above 0 (1e-6 changes next to nothing), or leave that unset."
        )
    if settings.adaptive_kl is not None and settings.kl_coef == 0:
        raise UserError("ppo.adaptive_kl scales ppo.kl_coef, which is 0: set it above 0.")
    if settings.old_logprobs == "sampler":
        if not config.generation.samples_all:
            raise UserError(
                "ppo.old_logprobs=sampler needs tokens drawn from the whole distribution: leave "
                "generation.top_k, top_p and min_new_tokens unset, or choose recompute."
            )
        if settings.importance_cap is not None:
            raise UserError(
                "ppo.importance_cap corrects for the sampler's log-probs, and with "
                "ppo.old_logprobs=sampler there is nothing to correct: leave one of them unset."
            )
    if settings.critic_warmup_steps >= config.steps:
        raise UserError(
            f"ppo.critic_warmup_steps={settings.critic_warmup_steps} leaves none of the "
            f"{config.steps} steps for the policy: lower it, or raise steps."
        )
    if settings.dual_clip is not None and settings.objective != "clip":
        raise UserError(
            f"ppo.dual_clip bounds the clipped objective, and ppo.objective={settings.objective} "
            "has none: leave it unset."
        )


def check_generate(config: GenerateConfig) -> None:
    """The same for `ppo-engine generate`."""
    if bool(config.prompt) == bool(config.data.path):
        raise UserError("Give either prompts (--data FILE) or one prompt (--prompt TEXT).")
    check_generation(config.generation)
    if config.resume and not config.output:
        raise UserError("--resume needs --out: the file that is to be completed.")
    reward = config.reward
    named = reward.path or reward.function or reward.url or reward.sources
    for name in ("arguments", "weights"):
        if getattr(reward, name) and not named:
            raise UserError(
                f"reward.{name} would have no effect, as no reward was given: name it with "
                f"--reward, or leave reward.{name} out."
            )


def _check_shared_base(config: PPOConfig) -> None:
    if config.policy.lora is None:
        raise UserError(
            "share_base keeps the base as it is and trains adapters on it: set policy.lora, such "
            "as policy.lora.rank=16, or leave share_base unset."
        )
    for name in ("path", "quantization"):
        if value := getattr(config.critic, name):
            raise UserError(
                f"critic.{name}={value} would be of another base than the policy's: leave "
                f"critic.{name} or share_base unset."
            )


def check_generation(config: GenerationConfig) -> None:
    if config.min_new_tokens >= config.max_new_tokens:
        raise UserError(
            f"generation.min_new_tokens={config.min_new_tokens} leaves no room for an end in "
            f"generation.max_new_tokens={config.max_new_tokens}: lower it, or raise that."
        )


def _check_evaluation(config: EvaluationConfig) -> None:
    if config.path and config.prompts:
        raise UserError("Set either evaluation.path or evaluation.prompts, not both.")
    held_out = config.path or config.prompts
    for name in ("every", "patience"):
        if getattr(config, name) and not held_out:
            raise UserError(
                f"evaluation.{name} is set, but no prompts are held out: set evaluation.prompts, "
                "or evaluation.path."
            )
    if config.best_of > 1 and not held_out:
        raise UserError(
            "evaluation.best_of is set, but no prompts are held out: set evaluation.prompts, or "
            "evaluation.path."
        )
    if config.patience and not config.every:
        raise UserError(
            "evaluation.patience counts evaluations during training: set evaluation.every."
        )

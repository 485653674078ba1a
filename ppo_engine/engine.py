"""One PPO step, in the order of the textbook:

    rollout    = engine.generate(prompts)                     # 1 the policy writes responses
    scores     = engine.score(rollout)                        # 2 the reward scores them
    experience = engine.estimate_advantages(rollout, scores)  # 3 KL to the reference, values, GAE
    metrics    = engine.update(experience)                    # 4 policy, 5 critic

`PPOTrainer` calls these in a loop; call them from a loop of your own for anything else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine import models, value_model
from ppo_engine.anatomy import span
from ppo_engine.checkpoint import load_trainable_state, trainable_state
from ppo_engine.config import PPOConfig
from ppo_engine.kl_control import KLController
from ppo_engine.optim import make_optimizer, make_scheduler, optimizer_step
from ppo_engine.policy import Policy
from ppo_engine.rewards import (
    RewardFunction,
    RewardModel,
    ScoreNormalizer,
    apply_missing_eos,
    load_reward,
    same_tokenizer,
)
from ppo_engine.rollout import Experience, Rollout
from ppo_engine.text import Prompt
from ppo_kernels import gae, kl_shaped_gae, ppo_value_loss
from ppo_kernels.reference import ShapedGAE


class PPOEngine:
    """Policy, frozen reference, frozen reward and critic, with their optimizers.

    Args:
        policy: a causal language model: Hugging Face name, folder, or a loaded model (then with
            `tokenizer`). Empty: `config.policy.path`.
        reward: a reward model's name or folder, `"file.py:function"`, or a function
            `(prompts, responses, **columns) -> list[float]`. None: `config.reward`.
        config: every setting; see `PPOConfig`. The learning rate decays over `config.steps`
            updates of `config.ppo.rollout_batch_size` responses each: set both to what your loop
            does, or the schedule to "constant".
        tokenizer: of a policy that is handed in loaded.

    Raises:
        UserError: a model, reward or setting that cannot be used, before anything is trained.
    """

    def __init__(
        self,
        policy: str | PreTrainedModel = "",
        reward: str | Callable[..., Sequence[float]] | RewardModel | RewardFunction | None = None,
        *,
        config: PPOConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config = config or PPOConfig()
        self.device = models.choose_device(config.run.device)
        self.dtype = models.choose_dtype(config.run.dtype, self.device)
        torch.manual_seed(config.run.seed)
        self.shuffle = torch.Generator().manual_seed(config.run.seed)

        self.policy = Policy.open(
            policy, config.policy, device=self.device, dtype=self.dtype, tokenizer=tokenizer
        )
        self.reference = self.policy.reference()
        self.reward = load_reward(
            reward if reward is not None else config.reward,
            device=self.device,
            dtype=self.dtype,
            micro_batch_size=config.ppo.micro_batch_size,
        )
        # A reward model that reads the policy's own tokens: no text in between.
        self._shared_reward_model = (
            self.reward
            if isinstance(self.reward, RewardModel)
            and same_tokenizer(self.reward.tokenizer, self.policy.tokenizer)
            else None
        )
        self.critic = self._make_critic()

        self.policy_optimizer = make_optimizer(self.policy.model, config.policy.optimizer)
        self.critic_optimizer = make_optimizer(self.critic, config.critic.optimizer)
        per_step = config.ppo.epochs * math.ceil(
            config.ppo.rollout_batch_size / config.ppo.mini_batch_size
        )
        updates = config.steps * per_step
        self.policy_scheduler = make_scheduler(
            self.policy_optimizer, config.policy.optimizer, updates
        )
        self.critic_scheduler = make_scheduler(
            self.critic_optimizer, config.critic.optimizer, updates
        )
        self.kl = KLController(config.ppo.kl_coef, config.ppo.adaptive_kl, self.device)
        self.normalizer = ScoreNormalizer() if config.reward.normalize else None
        self.policy_version = 0

    @span("generate")
    def generate(
        self, prompts: Sequence[Prompt], columns: dict[str, list[Any]] | None = None
    ) -> Rollout:
        """Sample a response to each prompt: text, or chat messages.

        `columns` holds lists as long as `prompts`, handed on to a reward function.
        """
        return self.policy.generate(prompts, self.config.generation, columns)

    @span("score")
    def score(self, rollout: Rollout) -> Tensor:
        """What the reward says of each response, [B] fp32; neither normalized nor penalized."""
        if self._shared_reward_model is not None:
            return self._shared_reward_model.score_tokens(*rollout.sequences())
        scores = self.reward(
            rollout.prompts, rollout.responses, rollout.finished.tolist(), rollout.columns
        )
        return scores.to(self.device)

    @span("advantages")
    def estimate_advantages(self, rollout: Rollout, scores: Tensor | Sequence[float]) -> Experience:
        """KL to the reference, values, and generalized advantages; `scores` are B numbers.

        Raises ValueError where there is not one finite score for each response.
        """
        scores = torch.as_tensor(scores, dtype=torch.float32, device=self.device)
        if scores.shape != (len(rollout),) or not scores.isfinite().all():
            raise ValueError(
                f"scores must be {len(rollout)} finite numbers, one for each response, but are "
                f"{tuple(scores.shape)}: {scores.flatten()[:8].tolist()}"
            )
        if self.normalizer is not None:
            scores = self.normalizer(scores)
        scores = apply_missing_eos(scores, rollout.finished, self.config.reward)

        with torch.no_grad():
            logprobs, ref_logprobs, entropy = self.compare_with_reference(rollout)
            (values,) = self._over(rollout, lambda part: (self._values(part),))
        shaped = self._shaped_gae(scores, logprobs, ref_logprobs, values, rollout.mask)
        kl_coef = self.kl.coef.clone()
        self.kl.update(shaped.kl.mean(), len(rollout))
        return Experience(
            rollout=rollout,
            scores=scores,
            advantages=shaped.advantages,
            returns=shaped.returns,
            kl=shaped.kl,
            kl_coef=kl_coef,
            moments=shaped.moments,
            policy_version=self.policy_version,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            entropy=entropy,
        )

    @torch.no_grad()
    def compare_with_reference(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of policy and reference, and the policy's entropies: each [B, T] fp32, 0 at
        padding. Their difference, summed over a response, estimates the KL divergence."""
        logprobs, ref_logprobs, entropy = self._over(rollout, self._compare)
        return logprobs, ref_logprobs, entropy

    @span("update")
    def update(self, experience: Experience) -> dict[str, float]:
        """Train policy and critic on `experience`; returns the step's metrics."""
        settings = self.config.ppo
        metrics = self._objective_metrics(experience)
        records: dict[str, list[Tensor]] = defaultdict(list)
        for _ in range(settings.epochs):
            order = torch.randperm(len(experience), generator=self.shuffle)
            for rows in order.split(settings.mini_batch_size):
                for found in (
                    self._update_policy(experience, rows),
                    self._update_critic(experience, rows),
                ):
                    for name, value in found.items():
                        records[name].append(value)
        for name, values in records.items():
            over_steps = torch.stack(values)
            metrics[name] = float(over_steps.max() if name.endswith("max") else over_steps.mean())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, for `load_state_dict` of an engine made alike."""
        return {
            "policy": trainable_state(self.policy.model),
            "critic": trainable_state(self.critic),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "policy_scheduler": self.policy_scheduler.state_dict(),
            "critic_scheduler": self.critic_scheduler.state_dict(),
            "policy_version": self.policy_version,
            "kl_coef": self.kl.coef,
            "normalizer": self.normalizer.state_dict() if self.normalizer else None,
            "shuffle": self.shuffle.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_trainable_state(self.policy.model, state["policy"])
        load_trainable_state(self.critic, state["critic"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.policy_scheduler.load_state_dict(state["policy_scheduler"])
        self.critic_scheduler.load_state_dict(state["critic_scheduler"])
        for optimizer, scheduler in (
            (self.policy_optimizer, self.policy_scheduler),
            (self.critic_optimizer, self.critic_scheduler),
        ):
            # A run may go on for more steps than it was begun with: the schedule is the new one.
            settings = zip(
                optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            )
            for group, base, factor in settings:
                group["lr"] = base * factor(scheduler.last_epoch)
        self.policy_version = state["policy_version"]
        self.kl.coef.copy_(state["kl_coef"])
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])
        self.shuffle.set_state(state["shuffle"].cpu())

    def _update_policy(self, experience: Experience, rows: Tensor) -> dict[str, Tensor]:
        """One optimizer step on the mini-batch `rows`, accumulated over micro-batches."""
        settings = self.config.ppo
        tokens = experience.rollout.mask[rows].sum()
        found: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        self.policy.model.train()
        for part in map(experience.select, rows.split(settings.micro_batch_size)):
            # Until the first step the old log-probs are those of this very pass; measured again in
            # another batch they would differ by rounding, and the ratio from 1.
            on_policy = self.policy_version == experience.policy_version
            with span("policy"):
                loss, stats = self.policy.policy_loss(
                    part.rollout,
                    None if on_policy else part.logprobs,
                    part.advantages,
                    self.config.generation.temperature,
                    clip_range=settings.clip_range,
                    moments=part.moments if settings.whiten_advantages else None,
                    normalizer=tokens,
                    entropy_coef=settings.entropy_coef,
                )
            with span("backward"):
                loss.backward()
            share = part.rollout.mask.sum() / tokens
            found["policy/loss"] += loss.detach()
            for name in ("approx_kl", "clip_fraction", "ratio_mean"):
                found[f"policy/{name}"] += getattr(stats, name) * share
            found["policy/ratio_max"] = torch.maximum(found["policy/ratio_max"], stats.ratio_max)
        self.policy.model.eval()
        found["policy/grad_norm"] = optimizer_step(
            self.policy_optimizer, self.policy_scheduler, self.config.policy.optimizer, "the policy"
        )
        self.policy_version += 1
        return found

    def _update_critic(self, experience: Experience, rows: Tensor) -> dict[str, Tensor]:
        """One optimizer step of the critic on the same mini-batch."""
        settings = self.config.ppo
        tokens = experience.rollout.mask[rows].sum()
        found: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for part in map(experience.select, rows.split(settings.micro_batch_size)):
            with span("losses"):
                loss, stats = ppo_value_loss(
                    self._values(part.rollout),
                    part.values,
                    part.returns,
                    mask=part.rollout.mask,
                    clip_range=settings.value_clip_range,
                    normalizer=tokens,
                )
            with span("backward"):
                loss.backward()
            share = part.rollout.mask.sum() / tokens
            found["value/loss"] += loss.detach()
            found["value/clip_fraction"] += stats.clip_fraction * share
        found["value/grad_norm"] = optimizer_step(
            self.critic_optimizer, self.critic_scheduler, self.config.critic.optimizer, "the critic"
        )
        return found

    @span("gae")
    def _shaped_gae(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor
    ) -> ShapedGAE:
        settings = self.config.ppo
        if not settings.whiten_rewards:
            return kl_shaped_gae(
                scores,
                logprobs,
                ref_logprobs,
                values,
                kl_coef=self.kl.coef,
                gamma=settings.gamma,
                lam=settings.lam,
                kl_estimator=settings.kl_estimator,
                mask=mask,
            )
        # With gamma = lam = 0 the returns are the shaped rewards themselves.
        rewards = kl_shaped_gae(
            scores,
            logprobs,
            ref_logprobs,
            torch.zeros_like(values),
            kl_coef=self.kl.coef,
            gamma=0.0,
            lam=0.0,
            kl_estimator=settings.kl_estimator,
            mask=mask,
        )
        count, _, m2 = rewards.moments
        # Reward whitening scales and does not shift: a shift would pay for every token written.
        scaled = rewards.returns * torch.rsqrt(m2 / count + 1e-8)
        advantages, returns = gae(scaled, values, gamma=settings.gamma, lam=settings.lam, mask=mask)
        real = advantages[mask]
        mean = real.mean()
        moments = torch.stack((count, mean, (real - mean).square().sum()))
        return ShapedGAE(advantages, returns, rewards.kl, moments)

    def _compare(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, reference's log-probs, entropies) of a micro-batch."""
        policy, reference = self.policy, self.reference or self.policy
        temperature = self.config.generation.temperature
        unadapted = nullcontext() if self.reference else policy.without_adapter()
        with span("policy"):
            states = policy.states(rollout)
        if policy.shares_head(reference):
            with span("reference"), unadapted:
                ref_states = reference.states(rollout)
            found = policy.stacked_logprobs([states, ref_states], rollout, temperature)
            (logprobs, entropy), (ref_logprobs, _) = found
        else:
            [(logprobs, entropy)] = policy.stacked_logprobs([states], rollout, temperature)
            with span("reference"), unadapted:
                ref_logprobs, _ = reference.response_logprobs(rollout, temperature)
        return logprobs, ref_logprobs, entropy

    def _over(
        self, rollout: Rollout, measure: Callable[[Rollout], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`measure` in micro-batches, its [b, t] results put together as [B, T]."""
        width = rollout.mask.shape[1]
        rows = torch.arange(len(rollout)).split(self.config.ppo.micro_batch_size)
        found = [measure(rollout.select(part)) for part in rows]
        return tuple(
            torch.cat([pad(x, (0, width - x.shape[1])) for x in column])
            for column in zip(*found, strict=True)
        )

    @span("critic")
    def _values(self, rollout: Rollout) -> Tensor:
        """The critic's value before each response token, [B, T] fp32."""
        ids, mask = rollout.sequences()
        start = rollout.prompt_ids.shape[1] - 1
        with models.compute(self.device, self.dtype):
            values = value_model.token_values(self.critic, ids[:, :-1], mask[:, :-1], start)
        return values

    def _make_critic(self) -> Any:
        config = self.config
        shared = self._shared_reward_model
        reward_model = shared.model if shared is not None else None
        critic = value_model.make_critic(
            config.critic,
            self.policy.tokenizer,
            device=self.device,
            policy=self.policy.model,
            reward_model=reward_model,
            seed=config.run.seed,
        )
        if reward_model is not None:
            models.share_frozen_parameters(critic, reward_model)
        return critic

    def _objective_metrics(self, experience: Experience) -> dict[str, float]:
        rollout, mask = experience.rollout, experience.rollout.mask
        errors = (experience.values - experience.returns)[mask]
        variance = experience.returns[mask].var(unbiased=False)
        found = {
            "objective/scores": experience.scores.mean(),
            "objective/scores_std": experience.scores.std(unbiased=False),
            "objective/kl": experience.kl.mean(),
            "objective/kl_coef": experience.kl_coef,
            "objective/entropy": experience.entropy[mask].mean(),
            "objective/response_length": rollout.lengths.float().mean(),
            "objective/finished": rollout.finished.float().mean(),
            "value/explained_variance": 1 - errors.var(unbiased=False) / variance.clamp_min(1e-8),
            "policy/learning_rate": torch.tensor(self.policy_optimizer.param_groups[0]["lr"]),
        }
        return {name: float(value) for name, value in found.items()}

"""The critic: the value that it predicts at each token, and its training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from ppo_engine.models import freezing, precision, value_model
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.optimizer import Learner
from ppo_engine.ppo.experience import Experience
from ppo_engine.rewards.model import RewardModel
from ppo_engine.rollout.batch import Rollout
from ppo_engine.settings.schema import ModelConfig, PPOSettings
from ppo_engine.spans import span
from ppo_kernels import ppo_value_loss


class Critic:
    """A model with a value at each token, trained by the clipped value loss.

    It starts from its own `config.path`, else from `reward_model`, which reads the policy's tokens,
    else from the policy. `updates` is the number of optimizer steps of its schedule.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: LanguageModel,
        reward_model: RewardModel | None,
        *,
        updates: int,
        seed: int,
    ) -> None:
        self.device, self.dtype = policy.device, policy.dtype
        source = None if reward_model is None else reward_model.model
        self.model = value_model.make_critic(
            config,
            policy.tokenizer,
            device=policy.device,
            dtype=policy.dtype,
            policy=policy.model,
            reward_model=source,
            seed=seed,
        )
        if source is not None:
            freezing.share_frozen_parameters(self.model, source)
        self.learner = Learner(self.model, config.optimizer, updates, "the critic")

    @span("critic")
    def values(self, rollout: Rollout) -> Tensor:
        """The value before each response token, [B, T] fp32; meaningless elsewhere."""
        ids, mask = rollout.sequences()
        start = rollout.prompt_ids.shape[1] - 1
        with precision.compute(self.device, self.dtype):
            return value_model.token_values(self.model, ids[:, :-1], mask[:, :-1], start)

    def update(
        self, parts: Iterable[Experience], tokens: Tensor, settings: PPOSettings
    ) -> dict[str, Tensor]:
        """One optimizer step on a mini-batch of `tokens` (0-dim) tokens, in micro-batches."""
        found: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for part in parts:
            assert part.values is not None and part.returns is not None
            with span("losses"):
                loss, stats = ppo_value_loss(
                    self.values(part.rollout),
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
        found["value/grad_norm"] = self.learner.step()
        return found

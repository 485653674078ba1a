"""The critic: the value that it predicts at each token, and its training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ppo_engine.models import freezing, value_model
from ppo_engine.models.budget import Budget
from ppo_engine.models.finite import Losses
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.optimizer import Learner
from ppo_engine.models.reader import Reader
from ppo_engine.models.shared_base import SharedBase
from ppo_engine.models.token_rows import TokenRows
from ppo_engine.models.work import passing
from ppo_engine.ppo.experience import Experience, Part, in_parts
from ppo_engine.rewards.model import RewardModel
from ppo_engine.settings.schema import ModelConfig, PPOSettings
from ppo_engine.spans import span
from ppo_kernels import ppo_value_loss


class Critic:
    """A model with a value at each token, trained by the clipped value loss.

    It starts from its own `config.path`, else from `reward_model`, which reads the policy's tokens,
    else from the policy; with a `base`, it is adapters and a head on that. `updates` is the number
    of optimizer steps of its schedule.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: LanguageModel,
        reward_model: RewardModel | None,
        *,
        updates: int,
        seed: int,
        base: SharedBase | None = None,
    ) -> None:
        self.device, self.dtype = policy.device, policy.dtype
        source = None if reward_model is None else reward_model.model
        if base is not None:
            self.model = base.critic(config, source, seed)
        else:
            self.model = value_model.make_critic(
                config,
                policy.tokenizer,
                device=policy.device,
                dtype=policy.dtype,
                policy=policy.model,
                reward_model=source,
                seed=seed,
            )
            for other in (policy.model, source):
                if other is not None:
                    freezing.share_frozen_parameters(self.model, other)
        self.reader = Reader(self.model)
        self.learner = Learner(self.model, config.optimizer, updates, "the critic")

    @span("critic")
    def values(self, rows: TokenRows) -> Tensor:
        """The value before each token that `rows` predict, [tokens] fp32."""
        return value_model.read_values(self.model, self.reader, rows)

    def update(
        self, experience: Experience, numbers: Sequence[int], settings: PPOSettings, budget: Budget
    ) -> dict[str, Tensor]:
        """One optimizer step on the responses of these `numbers`, a mini-batch."""
        found, losses = in_parts(
            experience.rollout,
            numbers,
            self.reader,
            budget,
            lambda parts: self._backward(experience, parts, settings),
        )
        found["value/grad_norm"] = self.learner.step(losses)
        return found

    def _backward(
        self, experience: Experience, parts: Sequence[Part], settings: PPOSettings
    ) -> tuple[dict[str, Tensor], Losses]:
        """The gradient of a mini-batch, in these `parts`; its metrics, and each part's loss."""
        assert experience.values is not None and experience.returns is not None
        self.learner.clear_gradients()
        found: dict[str, Tensor] = defaultdict(
            lambda: torch.zeros((), dtype=torch.float32, device=self.device)
        )
        losses: list[tuple[list[int], Tensor]] = []
        tokens = max(1, sum(len(part.places) for part in parts))
        for part in parts:
            values = self.values(part.rows)
            with span("losses"):
                loss, stats = ppo_value_loss(
                    values,
                    part.of(experience.values),
                    part.of(experience.returns),
                    clip_range=settings.value_clip_range,
                    normalizer=tokens,
                )
            with span("backward"), passing():
                loss.backward()
            found["value/loss"] += loss.detach()
            losses.append((part.numbers, loss.detach()))
            found["value/clip_fraction"] += stats.clip_fraction * (len(part.places) / tokens)
        return found, losses

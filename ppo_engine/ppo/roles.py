"""The models of a run, made in the order in which each can take what those before it have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.errors import UserError
from ppo_engine.models import freezing
from ppo_engine.models.budget import Budget
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.reader import Limit
from ppo_engine.models.shared_base import SharedBase
from ppo_engine.ppo.critic import Critic
from ppo_engine.pretrained.adapters import check_saving, is_adapted
from ppo_engine.rewards.model import RewardModel
from ppo_engine.rewards.weighted import Rewards, RewardsLike, load_rewards
from ppo_engine.settings.schema import PPOConfig


@dataclass(frozen=True)
class Roles:
    """Who takes part in a step."""

    policy: LanguageModel
    reference: LanguageModel | None  # None: the policy without its adapters
    rewards: Rewards
    critic: Critic | None  # None: the estimator needs none
    budget: Budget  # of their passes

    @property
    def scorers(self) -> list[RewardModel]:
        """The reward models that read the policy's own tokens."""
        return [*self.rewards.by_tokens.values()]


def load_roles(
    policy: str | PreTrainedModel,
    reward: RewardsLike | None,
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Roles:
    """As `PPOEngine` takes them. Layers that are frozen in several models are held once; with
    `share_base`, the base of all of them."""
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    writer = LanguageModel.open(
        policy,
        config.policy,
        tokenizer=tokenizer,
        template_arguments=config.data.chat_template_kwargs,
        date=config.run.date,
        **where,
    )
    if config.run.save_adapters:
        check_saving(writer.model)
    budget = Budget(Limit.of(config.ppo, writer.model), "ppo")
    reference = writer.reference()
    base = SharedBase(writer.model, writer.tokenizer, **where) if config.share_base else None
    rewards = load_rewards(
        reward, config.reward, writer.renderer, budget=budget, base=base, **where
    )
    scorers = [*rewards.by_tokens.values()]
    for scorer in scorers:
        freezing.share_frozen_parameters(scorer.model, writer.model)
    if scorers and base is not None and config.critic.lora != config.policy.lora:
        raise UserError(
            "critic.lora would have no effect: with share_base, the critic goes on with the "
            "adapters of the reward model. Leave it unset."
        )
    critic = (
        Critic(
            config.critic,
            writer,
            scorers[0] if scorers else None,
            updates=config.steps * optimizer_steps(config),
            seed=config.run.seed,
            base=base,
        )
        if config.ppo.has_critic
        else None
    )
    if critic is not None and config.run.save_adapters and is_adapted(critic.model):
        check_saving(critic.model)
    return Roles(writer, reference, rewards, critic, budget)


def optimizer_steps(config: PPOConfig) -> int:
    """Those of a step of the run, of each model that is trained."""
    return config.ppo.epochs * math.ceil(config.ppo.rollout_batch_size / config.ppo.mini_batch_size)

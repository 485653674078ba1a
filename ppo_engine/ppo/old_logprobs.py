"""Whose log-probs the ratio of an update starts from: the sampler's own, or those of a pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ppo_engine.ppo.experience import SAMPLERS_BOUND, logprob_difference, of_sampler
from ppo_engine.ppo.passes import Passes
from ppo_engine.rollout.batch import Rollout
from ppo_engine.settings.schema import PPOConfig


class Measured(NamedTuple):
    """Each `[B, T]` fp32, 0 elsewhere."""

    logprobs: Tensor  # of the policy before the update
    ref_logprobs: Tensor | None  # where something uses the KL
    entropy: Tensor | None  # of the policy; None where no pass measured its log-probs
    deferred: bool = False  # `logprobs` are the sampler's until the update has measured them


class OldLogprobs:
    """By `ppo.old_logprobs`. `are_samplers` is None until the first rollout has shown whether the
    sampler's may be taken."""

    def __init__(self, config: PPOConfig, passes: Passes) -> None:
        self._config, self._passes = config, passes
        choices = {"sampler": True, "recompute": False}
        self.are_samplers = choices.get(config.ppo.old_logprobs)
        if config.ppo.importance_cap is not None:  # they are what it compares with
            self.are_samplers = False

    def measure(self, rollout: Rollout) -> Measured:
        uses_kl = self._config.ppo.uses_kl
        deferred = self.are_samplers is False and self._may_wait(rollout)
        # Not on the first rollout, so that what is measured there is exact: a KL of 0.
        sampled = of_sampler(rollout) if self.are_samplers or deferred else None
        if sampled is not None:
            ref_logprobs = self._passes.of_reference(rollout) if uses_kl else None
            return Measured(sampled, ref_logprobs, None, deferred)
        ref_logprobs = None
        if uses_kl:
            logprobs, ref_logprobs, entropy = self._passes.of_both(rollout)
        else:
            logprobs, entropy = self._passes.of_policy(rollout)
        if self.are_samplers is None:
            mean, _ = logprob_difference(rollout, logprobs)
            samples_all = self._config.generation.samples_all
            self.are_samplers = samples_all and float(mean) <= SAMPLERS_BOUND
        return Measured(logprobs, ref_logprobs, entropy)

    def _may_wait(self, rollout: Rollout) -> bool:
        """Whether the update measures them by the way: it is one optimizer step, on policy, and
        until then nothing but metrics asks for them."""
        ppo = self._config.ppo
        return (
            ppo.old_logprobs == "auto"
            and ppo.importance_cap is None
            and self._config.generation.samples_all
            and ppo.epochs == 1
            and len(rollout) <= ppo.mini_batch_size
            and not (ppo.uses_kl and ppo.kl_in == "reward")
            and ppo.adaptive_kl is None
            and ppo.critic_warmup_steps == 0
        )

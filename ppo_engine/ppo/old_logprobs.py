"""Whose log-probs the ratio of an update starts from: the sampler's own, or those of a pass."""

from __future__ import annotations

from torch import Tensor

from ppo_engine.ppo.experience import SAMPLERS_BOUND, logprob_difference, of_sampler
from ppo_engine.ppo.passes import Passes
from ppo_engine.rollout.batch import Rollout
from ppo_engine.settings.schema import PPOConfig


class OldLogprobs:
    """By `ppo.old_logprobs`. `are_samplers` is None until the first rollout has shown whether the
    sampler's may be taken."""

    def __init__(self, config: PPOConfig, passes: Passes) -> None:
        self._config, self._passes = config, passes
        choices = {"sampler": True, "recompute": False}
        self.are_samplers = choices.get(config.ppo.old_logprobs)
        if config.ppo.importance_cap is not None:  # they are what it compares with
            self.are_samplers = False

    def measure(self, rollout: Rollout) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs of the policy before the update; those of the reference, where something uses
        the KL; the policy's entropies, where its log-probs are not the sampler's. All `[B, T]`."""
        uses_kl = self._config.ppo.uses_kl
        # Also on the first rollout, so that what is measured there is exact: a KL of 0.
        sampled = of_sampler(rollout) if self.are_samplers else None
        if sampled is not None:
            return sampled, self._passes.of_reference(rollout) if uses_kl else None, None
        ref_logprobs = None
        if uses_kl:
            logprobs, ref_logprobs, entropy = self._passes.of_both(rollout)
        else:
            logprobs, entropy = self._passes.of_policy(rollout)
        if self.are_samplers is None:
            mean, _ = logprob_difference(rollout, logprobs)
            self.are_samplers = self._samples_all and float(mean) <= SAMPLERS_BOUND
        return logprobs, ref_logprobs, entropy

    @property
    def _samples_all(self) -> bool:
        """Whether tokens are drawn from the very distribution whose log-probs are trained."""
        of = self._config.generation
        return not (of.top_k or of.top_p < 1 or of.min_new_tokens)

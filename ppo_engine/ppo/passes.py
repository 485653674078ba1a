"""What policy, reference and critic say of a rollout, in passes without gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ppo_engine.models.budget import Budget
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import TokenRows
from ppo_engine.ppo.critic import Critic
from ppo_engine.ppo.experience import Part, in_parts
from ppo_engine.ppo.trunks import Trunks
from ppo_engine.rollout.batch import Rollout
from ppo_engine.spans import span


class Passes:
    """Over the tokens that the policy wrote, at the `temperature` at which they were drawn; all
    results are `[B, T]` fp32, 0 elsewhere. Without a `reference`, it is the policy without its
    adapters."""

    def __init__(
        self,
        policy: LanguageModel,
        reference: LanguageModel | None,
        *,
        temperature: float,
        budget: Budget,
        trunks: Trunks,
    ) -> None:
        self._policy, self._reference = policy, reference or policy
        self._adapted = reference is None
        self._temperature, self._budget, self._trunks = temperature, budget, trunks

    @torch.no_grad()
    def of_policy(self, rollout: Rollout) -> tuple[Tensor, ...]:
        """(log-probs, entropies) of the policy."""
        policy = self._policy
        with span("policy"):
            return self._over(
                rollout, policy.reader, lambda rows: policy.logprobs(rows, self._temperature)
            )

    @torch.no_grad()
    def of_reference(self, rollout: Rollout) -> Tensor:
        """Log-probs of the reference."""
        reference = self._reference

        def measure(rows: TokenRows) -> tuple[Tensor, ...]:
            with self._unadapted():
                return reference.logprobs(rows, self._temperature)

        with span("reference"), reference.reader.on_device():
            logprobs, _ = self._over(rollout, reference.reader, measure)
        return logprobs

    @torch.no_grad()
    def of_both(self, rollout: Rollout) -> tuple[Tensor, ...]:
        """(log-probs, the reference's log-probs, entropies), in passes over the same tokens."""
        with self._reference.reader.on_device():
            return self._over(rollout, self._policy.reader, self._compare)

    @torch.no_grad()
    def of_critic(self, critic: Critic, rollout: Rollout) -> Tensor:
        """Its values."""
        (values,) = self._over(rollout, critic.reader, lambda rows: (critic.values(rows),))
        return values

    def _compare(self, rows: TokenRows) -> tuple[Tensor, ...]:
        policy, reference = self._policy, self._reference
        with span("policy"):
            states = policy.states(rows)
        if policy.shares_head(reference):
            with span("reference"), self._unadapted():
                ref_states = reference.states(rows)
            found = policy.stacked_logprobs([states, ref_states], rows.targets, self._temperature)
            (logprobs, entropy), (ref_logprobs, _) = found
        else:
            [(logprobs, entropy)] = policy.stacked_logprobs(
                [states], rows.targets, self._temperature
            )
            with span("reference"), self._unadapted():
                ref_logprobs, _ = reference.logprobs(rows, self._temperature)
        return logprobs, ref_logprobs, entropy

    def _unadapted(self) -> AbstractContextManager[Any]:
        return self._policy.without_adapter() if self._adapted else nullcontext()

    def _over(
        self, rollout: Rollout, reader: Reader, measure: Callable[[TokenRows], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `measure` finds of the policy's tokens, in passes."""

        def measured(parts: list[Part]) -> tuple[Tensor, ...]:
            places = torch.cat([part.places for part in parts])
            found = [*zip(*(measure(part.rows) for part in parts), strict=True)]
            return tuple(
                rollout.mask.new_zeros(rollout.mask.numel(), dtype=torch.float32)
                .index_copy(0, places, torch.cat(column))
                .view(rollout.mask.shape)
                for column in found
            )

        with self._trunks.of(rollout):
            return in_parts(rollout, range(len(rollout)), reader, self._budget, measured)

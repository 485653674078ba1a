"""What a step learns from: a rollout with its log-probs, values and advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_engine.models.budget import Budget, Result
from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import TokenRows
from ppo_engine.rollout.batch import Rollout

_OF_THE_WHOLE = {"moments", "kl_coef"}
# Nats, on average over tokens, by which a sampler's log-probs may differ from the policy's and be
# the old ones of PPO all the same: a tenth of its usual clip range.
SAMPLERS_BOUND = 0.02


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that an update needs; token tensors are [B, T] fp32."""

    rollout: Rollout
    scores: Tensor  # [B] the rewards' scores, shaped (`rewards.shaping`)
    logprobs: Tensor  # of the policy before the update, at the sampling temperature
    ref_logprobs: Tensor | None  # None where nothing uses the KL
    advantages: Tensor  # not whitened: the loss whitens with `moments`
    kl: Tensor  # [B] sum over the response, by `ppo.kl_estimator`
    kl_coef: Tensor  # 0-dim, the weight of the KL penalty
    moments: Tensor  # [3] (count, mean, M2) of the advantages
    entropy: Tensor | None  # of the policy at each token; None where `logprobs` are the sampler's
    policy_version: int  # optimizer steps the policy had taken when it was measured
    values: Tensor | None = None  # of the critic, where there is one
    returns: Tensor | None = None  # what the critic learns
    is_weights: Tensor | None = None  # truncated importance weights of the sampler's tokens
    rounding: Tensor | None = None  # [B] of the scores, as `estimators.Evidence` has it
    sampled: bool = False  # whether `logprobs` are the sampler's
    deferred: bool = False  # they are only until the update has written its own pass's there

    def __len__(self) -> int:
        return len(self.rollout)

    def select(self, rows: Tensor) -> Experience:
        """The given rows, trimmed like `Rollout.select`; whitening stays the whole batch's."""
        rollout = self.rollout.select(rows)
        width = rollout.mask.shape[1]
        picked: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name not in _OF_THE_WHOLE and isinstance(value, Tensor):
                picked[entry.name] = value[rows, :width] if value.ndim == 2 else value[rows]
        return replace(self, rollout=rollout, **picked)


class Part(NamedTuple):
    """Responses of a rollout that one forward pass reads."""

    numbers: list[int]
    rows: TokenRows
    places: Tensor  # [tokens] of the policy's, in [B, T] flattened, response by response

    def of(self, x: Tensor) -> Tensor:
        """Of numbers [B, T], those of the policy's tokens: `[tokens]`."""
        return x.flatten().index_select(0, self.places)

    @property
    def cu_seqlens(self) -> Tensor:
        """`[responses + 1]`: where each response's tokens begin, and the end of the last."""
        return torch.tensor([0, *accumulate(self.rows.counts)], device=self.places.device)


def in_parts(
    rollout: Rollout,
    numbers: Sequence[int],
    reader: Reader,
    budget: Budget,
    attempt: Callable[[list[Part]], Result],
) -> Result:
    """What `attempt` gives of the passes in which `reader` reads the responses of these `numbers`;
    called again where memory runs out, see `Budget.run`."""
    rows = [rollout.rows[number] for number in numbers]

    def stacked(passes: list[list[int]]) -> Result:
        parts = []
        for planned in passes:
            own = [numbers[i] for i in planned]
            parts.append(Part(own, reader.stack([rows[i] for i in planned]), rollout.places(own)))
        return attempt(parts)

    return budget.run([len(row.ids) for row in rows], stacked, packed=reader.packs)


def importance_weights(rollout: Rollout, logprobs: Tensor, cap: float | None) -> Tensor | None:
    """min(pi_old / pi_sampler, cap) of each token, [B, T] fp32; None without a cap.

    Truncated importance sampling (Ionides 2008) for samplers whose log-probs differ from the
    trainer's: by rounding, in another engine, or by top-k and top-p.
    """
    if cap is None:
        return None
    if rollout.logprobs is None:
        raise ValueError("ppo.importance_cap needs Rollout.logprobs, those of the sampler.")
    log_ratio = torch.where(rollout.mask, logprobs - rollout.logprobs, 0.0)
    return log_ratio.clamp(max=math.log(cap)).exp()


def of_sampler(rollout: Rollout) -> Tensor | None:
    """The sampler's log-probs, [B, T] fp32, 0 elsewhere; None where they are not known, as of a
    rollout that was padded further without them."""
    found = rollout.logprobs
    if found is None or found.shape != rollout.mask.shape:
        return None
    return torch.where(rollout.mask, found, 0.0)


def logprob_difference(rollout: Rollout, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and largest |log pi - log pi_sampler| of the policy's tokens, in nats; infinite where
    the sampler's are not known."""
    sampled = of_sampler(rollout)
    if sampled is None:
        unknown = logprobs.new_tensor(math.inf)
        return unknown, unknown
    difference = (logprobs - sampled)[rollout.mask].abs()
    return difference.mean(), difference.max()


def objective_metrics(experience: Experience, cap: float | None = None) -> dict[str, float]:
    """Metrics of a step's rollout, as it was before the update; `cap` of its importance weights."""
    rollout, mask = experience.rollout, experience.rollout.mask
    found = {
        "objective/scores": experience.scores.mean(),
        "objective/scores_std": experience.scores.std(unbiased=False),
        "objective/kl_coef": experience.kl_coef,
        "objective/response_length": rollout.lengths.float().mean(),
        "objective/finished": rollout.finished.float().mean(),
    }
    if experience.ref_logprobs is not None:
        # Unbiased, whatever the estimator of the penalty.
        difference = experience.logprobs - experience.ref_logprobs
        found["objective/kl"] = torch.where(mask, difference, 0.0).sum(1).mean()
    if experience.entropy is not None:
        found["objective/entropy"] = experience.entropy[mask].mean()
    if not experience.sampled and of_sampler(rollout) is not None:
        mean, largest = logprob_difference(rollout, experience.logprobs)
        found |= {"rollout/logprob_diff": mean, "rollout/logprob_diff_max": largest}
    if experience.values is not None and experience.returns is not None:
        errors = (experience.values - experience.returns)[mask]
        returns = experience.returns[mask]
        rounding = 1e-6 * (errors.abs() + returns.abs()).max()
        variance = returns.var(unbiased=False)
        if variance > rounding**2:  # of returns that do not vary nothing can be explained
            found["value/explained_variance"] = 1 - errors.var(unbiased=False) / variance
    if experience.is_weights is not None:
        weights = experience.is_weights[mask]
        found["objective/importance_weight"] = weights.mean()
        if cap is not None:
            found["objective/importance_capped"] = (weights >= cap).float().mean()
    return {name: float(value) for name, value in found.items()}

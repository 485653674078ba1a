"""What a step learns from: a rollout with its log-probs, values and advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_engine.models.reader import Limit, Reader
from ppo_engine.models.token_rows import TokenRows
from ppo_engine.rollout.batch import Rollout

_OF_THE_WHOLE = {"moments", "kl_coef"}


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that an update needs; token tensors are [B, T] fp32."""

    rollout: Rollout
    scores: Tensor  # [B] the rewards' scores, shaped (`rewards.shaping`)
    logprobs: Tensor  # of the policy before the update, at the sampling temperature
    ref_logprobs: Tensor
    advantages: Tensor  # not whitened: the loss whitens with `moments`
    kl: Tensor  # [B] sum over the response, by `ppo.kl_estimator`
    kl_coef: Tensor  # 0-dim, the weight of the KL penalty
    moments: Tensor  # [3] (count, mean, M2) of the advantages
    entropy: Tensor  # of the policy at each token
    policy_version: int  # optimizer steps the policy had taken when it was measured
    values: Tensor | None = None  # of the critic, where there is one
    returns: Tensor | None = None  # what the critic learns
    is_weights: Tensor | None = None  # truncated importance weights of the sampler's tokens
    rounding: Tensor | None = None  # [B] of the scores, as `estimators.Evidence` has it

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


def parts_of(rollout: Rollout, numbers: Sequence[int], reader: Reader, limit: Limit) -> list[Part]:
    """The passes in which `reader` reads the responses of these `numbers`."""
    rows = [rollout.rows[number] for number in numbers]
    found = []
    for planned in reader.plan(rows, limit):
        own = [numbers[i] for i in planned]
        found.append(Part(own, reader.stack([rows[i] for i in planned]), rollout.places(own)))
    return found


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


def objective_metrics(experience: Experience) -> dict[str, float]:
    """Metrics of a step's rollout, as it was before the update."""
    rollout, mask = experience.rollout, experience.rollout.mask
    kl = torch.where(mask, experience.logprobs - experience.ref_logprobs, 0.0).sum(1)
    found = {
        "objective/scores": experience.scores.mean(),
        "objective/scores_std": experience.scores.std(unbiased=False),
        # Unbiased, whatever the estimator of the penalty.
        "objective/kl": kl.mean(),
        "objective/kl_coef": experience.kl_coef,
        "objective/entropy": experience.entropy[mask].mean(),
        "objective/response_length": rollout.lengths.float().mean(),
        "objective/finished": rollout.finished.float().mean(),
    }
    if experience.values is not None and experience.returns is not None:
        errors = (experience.values - experience.returns)[mask]
        variance = experience.returns[mask].var(unbiased=False).clamp_min(1e-8)
        found["value/explained_variance"] = 1 - errors.var(unbiased=False) / variance
    if experience.is_weights is not None:
        found["objective/importance_weight"] = experience.is_weights[mask].mean()
    return {name: float(value) for name, value in found.items()}

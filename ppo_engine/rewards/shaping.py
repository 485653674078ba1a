"""From the rewards' scores to what the policy is trained on, in this order:

1. the weighted sum of the rewards (`Rewards.total`)
2. normalization (`reward.normalize`), of that sum: nothing below changes its statistics
3. a response without EOS: its score replaced or lowered (`reward.missing_eos_score`, `…_penalty`)
4. the length penalty (`reward.length_penalty`), last, so that it is in the units of the finished
   score, is not normalized away, and reaches a response that has not ended, the longest of all
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ppo_engine.models import precision
from ppo_engine.rollout.batch import Rollout
from ppo_engine.settings.schema import RewardConfig


def shape_scores(
    scores: Tensor,
    rollout: Rollout,
    config: RewardConfig,
    normalizer: ScoreNormalizer | None,
    *,
    learn: bool,
) -> Tensor:
    """Steps 2 to 4 on the total scores [B] of the responses in `rollout`; [B].

    With `learn`, the normalizer updates its statistics with the scores.
    """
    if normalizer is not None:
        scores = normalizer(scores, learn=learn)
    scores = _apply_missing_eos(scores, rollout.finished, config)
    return scores - length_penalty(rollout.lengths, config)


def length_penalty(lengths: Tensor, config: RewardConfig) -> Tensor:
    """What is subtracted for responses of `lengths` tokens [B], EOS included: [B] fp32.

    `length_penalty` for each token beyond `length_penalty_from`. With a limit of L_max tokens, a
    start of L_max - cache and a penalty of 1/cache it is the soft overlong punishment of DAPO
    (Yu et al. 2025, arXiv:2503.14476, eq. 13).
    """
    return config.length_penalty * (lengths - config.length_penalty_from).clamp_min(0).float()


class ScoreNormalizer:
    """Shifts and scales scores to mean 0 and deviation 1, as measured on the first rollouts.

    Statistics grow until `responses` scores have been seen and are then fixed, so that the reward
    does not move while the policy learns (Ziegler et al. 2019, arXiv:1909.08593, section 2.1).
    """

    def __init__(self, responses: int = 256) -> None:
        self.responses = responses
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def __call__(self, scores: Tensor, *, learn: bool = True) -> Tensor:
        """Normalized scores, shaped like `scores`; an evaluation does not `learn` from them."""
        if learn and self.count < self.responses:
            self._add(scores.double())
        return (scores - self.mean) / self.scale

    @property
    def scale(self) -> float:
        """What scores are divided by: their deviation; 1 where that is rounding, as of scores that
        are all equal, which have no scale."""
        std = math.sqrt(self.m2 / max(self.count, 1))
        return std if std > max(1e-6, precision.rounding(torch.float32) * abs(self.mean)) else 1.0

    def _add(self, scores: Tensor) -> None:
        """Merge count, mean and sum of squared deviations (Chan et al. 1979)."""
        total = self.count + scores.numel()
        if not total:
            return
        shift = scores.mean().item() - self.mean
        self.m2 += scores.var(unbiased=False).item() * scores.numel()
        self.m2 += shift**2 * self.count * scores.numel() / total
        self.mean += shift * scores.numel() / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), state["mean"], state["m2"]


def _apply_missing_eos(scores: Tensor, finished: Tensor, config: RewardConfig) -> Tensor:
    """Scores `[B]` with those of unfinished responses replaced, or else lowered, as configured."""
    if config.missing_eos_score is not None:
        changed = torch.full_like(scores, config.missing_eos_score)
    else:
        changed = scores - config.missing_eos_penalty
    return torch.where(finished, scores, changed)

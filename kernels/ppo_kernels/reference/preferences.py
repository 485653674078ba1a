"""The preference losses, which train reward models."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_kernels.reference.common import accumulated, real, token_mean


class PairwiseStats(NamedTuple):
    """Statistics of the preference losses: 0-dim, detached, over pairs (0 without any)."""

    accuracy: Tensor  # share of pairs with chosen > rejected; a tie counts 1/2
    margin: Tensor  # mean of chosen - rejected


# Bradley-Terry (1952) preference loss, as for reward models in Ouyang et al. 2022, eq. 1, with the
# margin of Llama 2 (arXiv:2307.09288, eq. 2) and the centering of Eisenstein et al. 2023
# (arXiv:2312.09244):
#   mean of -log sigmoid(s+ - s- - margin) + center_coef (s+ + s-)^2
def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
) -> tuple[Tensor, PairwiseStats]:
    """Loss (0-dim) of score pairs `[P]`, differentiable in both; `margin` a number or `[P]`."""
    if isinstance(margin, Tensor):
        chosen, rejected, margin = accumulated(chosen, rejected, margin.detach())
    else:
        chosen, rejected = accumulated(chosen, rejected)
    difference, total = chosen - rejected, chosen + rejected
    loss = -F.logsigmoid(difference - (0.0 if margin is None else margin))
    loss = loss + center_coef * total * total
    with torch.no_grad():
        pairs = torch.ones_like(loss, dtype=torch.bool)
        wins = (difference > 0).to(loss.dtype) + (difference == 0).to(loss.dtype) / 2
        stats = PairwiseStats(token_mean(wins, pairs), token_mean(difference, pairs))
    return token_mean(loss, pairs), stats


# The same for rankings, all ordered pairs of a prompt's responses (Ouyang et al. 2022,
# arXiv:2203.02155, eq. 1), each prompt weighing the same:
#   mean over prompts of the mean over its pairs of -log sigmoid(s_better - s_worse)
def ranking_loss(scores: Tensor, ranks: Tensor) -> tuple[Tensor, PairwiseStats]:
    """Loss (0-dim) of `[P, K]` scores; lower ranks are better, equal ones no pair, negative absent.

    A prompt without any pair does not count. The statistics are over all pairs alike.
    """
    (scores,) = accumulated(scores)
    there = ranks >= 0
    scores = real(scores, there)
    better = there[:, :, None] & there[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    difference = scores[:, :, None] - scores[:, None, :]
    loss = real(-F.logsigmoid(difference), better)
    count = better.sum((1, 2))
    of_prompts = loss.sum((1, 2)) / count.clamp(min=1)
    with torch.no_grad():
        wins = (difference > 0).to(loss.dtype) + (difference == 0).to(loss.dtype) / 2
        stats = PairwiseStats(token_mean(wins, better), token_mean(difference, better))
    return of_prompts.sum() / (count > 0).sum().clamp(min=1), stats

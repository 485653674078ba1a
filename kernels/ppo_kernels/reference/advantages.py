"""Advantages and returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_kernels.reference.common import accumulated, kl_estimate, real
from ppo_kernels.sequences import is_last_real, padded, per_token, places_inside, sequence_sums


class ShapedGAE(NamedTuple):
    """Result of `kl_shaped_gae`."""

    advantages: Tensor  # shaped like the log-probs; not whitened
    returns: Tensor  # advantages + values
    kl: Tensor  # [B] sum over the sequence of the per-token estimate
    moments: Tensor  # [3] (count, mean, M2) of the advantages of real tokens


# Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 11 to 16):
#   delta_t = r_t + gamma V_{t+1} - V_t
#   A_t     = delta_t + gamma lam A_{t+1}
#   R_t     = A_t + V_t
# t+1 is the next real token of the sequence; V after the last one is `bootstrap`.
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(advantages, returns)`, shaped like `rewards`; `bootstrap` is `[B]`, default 0."""
    rewards, values, bootstrap = accumulated(rewards, values, bootstrap)
    if cu_seqlens is not None:
        inside = places_inside(cu_seqlens)
        rewards, values = (padded(x, cu_seqlens) for x in (rewards, values))
        mask = inside if mask is None else inside & padded(mask, cu_seqlens)
    elif mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    rewards, values = real(rewards, mask), real(values, mask)

    next_value = rewards.new_zeros(len(rewards))
    next_advantage = rewards.new_zeros(len(rewards))
    if bootstrap is not None:
        next_value = real(bootstrap, mask.any(1))
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # A masked token is skipped: what comes after it is carried through.
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(real(advantage, mask[:, t]))
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(rewards)
    returns = real(advantages + values, mask)
    if cu_seqlens is not None:
        return advantages[inside], returns[inside]
    return advantages, returns


# KL-shaped rewards (Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155):
#   r_t = -kl_coef k_t, plus the sequence's score on its last real token; then `gae`.
def kl_shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    *,
    kl_coef: float | Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> ShapedGAE:
    """Rewards from `scores` `[B]` and the KL penalty, then `gae`, with the advantages' moments."""
    logprobs, ref_logprobs, values, scores, bootstrap = accumulated(
        logprobs, ref_logprobs, values, scores, bootstrap
    )
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    log_ratio = real(logprobs, mask) - real(ref_logprobs, mask)
    kl = kl_estimate(log_ratio, kl_estimator)

    has_token = sequence_sums(mask.long(), cu_seqlens) > 0
    last = is_last_real(mask, cu_seqlens)
    terminal = real(per_token(real(scores, has_token), logprobs, cu_seqlens), last)
    advantages, returns = gae(
        terminal - kl_coef * kl, values, gamma=gamma, lam=lam, mask=mask, bootstrap=bootstrap,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip

    count = mask.sum().to(advantages.dtype)
    mean = advantages.sum() / count.clamp(min=1)
    m2 = real(advantages - mean, mask).square().sum()
    return ShapedGAE(
        advantages, returns, sequence_sums(kl, cu_seqlens), torch.stack((count, mean, m2))
    )

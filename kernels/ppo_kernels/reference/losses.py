"""The losses of the policy and of the critic."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_kernels.reference.common import (
    MAX_LOG_RATIO,
    accumulated,
    kl_estimate,
    real,
    token_mean,
)
from ppo_kernels.reference.logits import IGNORED_TARGET, linear_logprobs
from ppo_kernels.sequences import sequence_sums, token_means

WHITEN_EPS = 1e-8


class PolicyStats(NamedTuple):
    """Statistics of `ppo_policy_loss`: 0-dim, detached, over real tokens (0 without any)."""

    approx_kl: Tensor  # mean of (log pi - log pi_old)^2 / 2
    # Share of tokens whose clipped branch is strictly the larger loss; with the objective "cispo",
    # whose ratio is outside the clip range.
    clip_fraction: Tensor
    ratio_mean: Tensor  # over tokens, also of a ratio that a sequence's tokens share
    ratio_max: Tensor
    kl: Tensor  # mean estimate of KL(pi, pi_ref); 0 without ref_logprobs
    entropy: Tensor  # mean entropy; 0 without entropy


class ValueStats(NamedTuple):
    """Statistics of `ppo_value_loss`: 0-dim, detached, over real tokens (0 without any)."""

    clip_fraction: Tensor  # share of tokens whose clipped branch is strictly the larger loss
    value_mean: Tensor
    return_mean: Tensor
    error_mean_sq: Tensor  # mean of (V - R)^2
    return_var: Tensor  # biased variance of R


# PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7), as a loss:
#   rho_t = exp(clamp(log pi - log pi_old, -20, 20))
#   L_t   = max(-A rho, -A clip(rho, 1 - low, 1 + high))
# with the dual clip (Ye et al. 2020, arXiv:1912.09729, eq. 5): L_t = min(L_t, -c A) where A < 0;
# then w L_t + kl_coef k(pi, pi_ref) - entropy_coef H, reduced.
#
# ratio_level "sequence", GSPO (Zheng et al. 2025, arXiv:2507.18071): one ratio for all tokens of a
# sequence i, the geometric mean of theirs (eq. 7), in the form that takes an advantage per token
# (GSPO-token, eq. 13 and 14; sg stops the gradient):
#   s_i   = exp(clamp(mean over the sequence's real tokens of log pi - log pi_old, -20, 20))
#   rho_t = sg[s_i] pi_t / sg[pi_t]
# whose value is s_i, and whose derivative by log pi_t is s_i too, or 0 where the clamp holds it.
# Summed over a sequence of constant advantage and divided by its length, that is the gradient of
# A s_i, GSPO's own (eq. 5).
#
# objective "cispo" (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5): the clip holds the weight of a
# token, not its gradient:
#   L_t   = -sg[clip(rho, 1 - low, 1 + high)] A log pi
def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: str = "clip",
    ratio_level: str = "token",
    clip_range: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    moments: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    is_weights: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Return the loss (0-dim) and its statistics. Differentiable in `logprobs` and `entropy`."""
    low, high = clip_range if isinstance(clip_range, tuple | list) else (clip_range, clip_range)
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    inputs: Any = (logprobs, entropy, old_logprobs, advantages, ref_logprobs, is_weights)
    inputs = accumulated(*inputs[:2], *(None if x is None else x.detach() for x in inputs[2:]))
    inputs = (None if x is None else real(x, mask) for x in inputs)
    logprobs, entropy, old_logprobs, advantages, ref_logprobs, is_weights = inputs
    if moments is not None:
        advantages = real(_whiten(advantages, moments.detach()), mask)

    log_ratio = logprobs - old_logprobs
    held = log_ratio  # in the clamp
    if ratio_level == "sequence":
        # 0 with the gradient of the log-prob; where that is infinite, the mean is clamped.
        straight_through = torch.where(logprobs.isinf(), 0.0, logprobs - logprobs.detach())
        held = token_means(log_ratio.detach(), mask, cu_seqlens) + straight_through
    ratio = held.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    in_range = ratio.clamp(1 - low, 1 + high)
    if objective == "cispo":
        is_clipped = (ratio < in_range) | (ratio > in_range)
        loss = -in_range.detach() * advantages * logprobs
    else:
        unclipped, clipped = -advantages * ratio, -advantages * in_range
        # Not torch.maximum: in a tie the whole gradient is the unclipped branch's.
        is_clipped = clipped > unclipped
        loss = torch.where(is_clipped, clipped, unclipped)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        loss = torch.where((advantages < 0) & (bound < loss), bound, loss)
    if is_weights is not None:
        loss = loss * is_weights

    kl = torch.zeros_like(loss)
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs - ref_logprobs, kl_estimator)
        loss = loss + kl_coef * kl
    if entropy is not None:
        loss = loss - entropy_coef * entropy

    with torch.no_grad():
        stats = PolicyStats(
            approx_kl=token_mean(log_ratio.square() / 2, mask),
            clip_fraction=token_mean(is_clipped.to(loss.dtype), mask),
            ratio_mean=token_mean(ratio, mask),
            ratio_max=real(ratio, mask).amax() if ratio.numel() else ratio.new_zeros(()),
            kl=token_mean(kl, mask),
            entropy=token_mean(torch.zeros_like(loss) if entropy is None else entropy, mask),
        )
    return _reduce(loss, mask, cu_seqlens, reduction, normalizer), stats


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_logprobs: bool = False,
    **settings: Any,
) -> tuple[Any, ...]:
    """`ppo_policy_loss` of `linear_logprobs` and their entropy; without old log-probs, on policy.

    Returns the loss (0-dim) and its statistics, with `return_logprobs` the log-probs too, which are
    without a gradient. Differentiable in `hidden`, `weight` and `bias`.
    """
    if mask is not None:
        targets = targets.masked_fill(~mask, IGNORED_TARGET)
    logprobs, entropy = linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
        return_entropy=True,
    )  # fmt: skip
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    found = ppo_policy_loss(
        logprobs, old_logprobs, advantages, mask=mask, entropy=entropy, **settings
    )
    return (*found, logprobs.detach()) if return_logprobs else found


# The clipped value loss (Schulman et al. 2017; as in openai/baselines ppo2 and Ouyang et al. 2022):
#   L_t = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2
def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_range: float | None = 0.2,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    """Return the loss (0-dim) and its statistics. Differentiable in `values`."""
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    values, old_values, returns = (
        real(x, mask) for x in accumulated(values, old_values.detach(), returns.detach())
    )
    error_sq = (values - returns).square()
    loss, is_clipped = error_sq / 2, torch.zeros_like(mask)
    if clip_range is not None:
        clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
        clipped_sq = (clipped - returns).square()
        is_clipped = clipped_sq > error_sq
        loss = torch.where(is_clipped, clipped_sq, error_sq) / 2

    with torch.no_grad():
        return_mean = token_mean(returns, mask)
        stats = ValueStats(
            clip_fraction=token_mean(is_clipped.to(loss.dtype), mask),
            value_mean=token_mean(values, mask),
            return_mean=return_mean,
            error_mean_sq=token_mean(error_sq, mask),
            return_var=token_mean((returns - return_mean).square(), mask),
        )
    return _reduce(loss, mask, cu_seqlens, reduction, normalizer), stats


def _whiten(x: Tensor, moments: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps) with the biased variance of `moments`, (count, mean, M2)."""
    count, mean, m2 = moments.to(x.dtype).unbind()
    return (x - mean) * torch.rsqrt(m2 / count.clamp(min=1) + WHITEN_EPS)


def _reduce(
    loss: Tensor, mask: Tensor, cu_seqlens: Tensor | None, reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:  # fmt: skip
    """One number from per-token losses that are 0 where masked.

    `normalizer` replaces the denominator. A denominator of 0 (a batch with no real token, whose
    sum is 0) counts as 1.
    """
    if reduction == "token_mean":
        total, denominator = loss.sum(), mask.sum()
    elif reduction == "sequence_mean":
        tokens = sequence_sums(mask.long(), cu_seqlens)
        total = (sequence_sums(loss, cu_seqlens) / tokens.clamp(min=1)).sum()
        denominator = (tokens > 0).sum()
    elif reduction == "sum":
        total, denominator = loss.sum(), mask.new_ones((), dtype=torch.long)
    else:
        raise ValueError(
            f"reduction must be 'token_mean', 'sequence_mean' or 'sum', but is {reduction!r}"
        )
    if normalizer is not None:
        denominator = torch.as_tensor(normalizer, dtype=loss.dtype, device=loss.device)
    return total / torch.where(denominator == 0, 1, denominator)

"""What each op means: plain PyTorch, one function per op, written for reading.

These functions are the specification. They take float64, are differentiable, and every kernel is
tested against them. They compute in float32 (float64 for float64 inputs), trust their arguments
(`checks` guards the public ops), and select real tokens with `torch.where` *before* any
arithmetic, so that NaN under a mask reaches neither a value nor a gradient.

Shapes: B sequences, T padded tokens, N packed tokens, P pairs, V vocabulary. Token tensors are
`[B, T]` with an optional boolean `mask` (True is a real token), or `[N]` with `cu_seqlens`
`[B+1]` and, again, an optional mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_kernels.philox import uniform_numbers
from ppo_kernels.sequences import (
    is_last_real,
    padded,
    per_token,
    places_inside,
    sequence_sums,
    token_means,
)

MAX_LOG_RATIO = 20.0  # exp(20) is about 5e8: the loss stays finite when policies have diverged
WHITEN_EPS = 1e-8
IGNORED_TARGET = -100


class ShapedGAE(NamedTuple):
    """Result of `kl_shaped_gae`."""

    advantages: Tensor  # shaped like the log-probs; not whitened
    returns: Tensor  # advantages + values
    kl: Tensor  # [B] sum over the sequence of the per-token estimate
    moments: Tensor  # [3] (count, mean, M2) of the advantages of real tokens


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


class PairwiseStats(NamedTuple):
    """Statistics of the preference losses: 0-dim, detached, over pairs (0 without any)."""

    accuracy: Tensor  # share of pairs with chosen > rejected; a tie counts 1/2
    margin: Tensor  # mean of chosen - rejected


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
    rewards, values, bootstrap = _accumulated(rewards, values, bootstrap)
    if cu_seqlens is not None:
        inside = places_inside(cu_seqlens)
        rewards, values = (padded(x, cu_seqlens) for x in (rewards, values))
        mask = inside if mask is None else inside & padded(mask, cu_seqlens)
    elif mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    rewards, values = _real(rewards, mask), _real(values, mask)

    next_value = rewards.new_zeros(len(rewards))
    next_advantage = rewards.new_zeros(len(rewards))
    if bootstrap is not None:
        next_value = _real(bootstrap, mask.any(1))
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # A masked token is skipped: what comes after it is carried through.
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(_real(advantage, mask[:, t]))
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(rewards)
    returns = _real(advantages + values, mask)
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
    logprobs, ref_logprobs, values, scores, bootstrap = _accumulated(
        logprobs, ref_logprobs, values, scores, bootstrap
    )
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    log_ratio = _real(logprobs, mask) - _real(ref_logprobs, mask)
    kl = _kl_estimate(log_ratio, kl_estimator)

    has_token = sequence_sums(mask.long(), cu_seqlens) > 0
    last = is_last_real(mask, cu_seqlens)
    terminal = _real(per_token(_real(scores, has_token), logprobs, cu_seqlens), last)
    advantages, returns = gae(
        terminal - kl_coef * kl, values, gamma=gamma, lam=lam, mask=mask, bootstrap=bootstrap,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip

    count = mask.sum().to(advantages.dtype)
    mean = advantages.sum() / count.clamp(min=1)
    m2 = _real(advantages - mean, mask).square().sum()
    return ShapedGAE(
        advantages, returns, sequence_sums(kl, cu_seqlens), torch.stack((count, mean, m2))
    )


# log softmax(z / temperature)_y, and the entropy of the same distribution, H = -sum_j p_j log p_j.
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets` `[...]` under `logits` `[..., V]`, and the entropy if wanted.

    A target of -100 is ignored: log-prob and entropy are 0 and its logits are not read.
    """
    (logits,) = _accumulated(logits)
    wanted = targets != IGNORED_TARGET
    log_p = F.log_softmax(_real(logits, wanted.unsqueeze(-1)) / temperature, dim=-1)
    index = _real(targets, wanted).long().unsqueeze(-1)
    logprobs = _real(log_p.gather(-1, index).squeeze(-1), wanted)
    if not return_entropy:
        return logprobs
    # p log p is 0 where p is 0, also for a logit of -inf.
    finite_log_p = torch.where(log_p == -torch.inf, 0.0, log_p)
    entropy = -(log_p.exp() * finite_log_p).sum(-1)
    return logprobs, _real(entropy, wanted)


# The same of a language model's head, z = hidden weight^T + bias, capped: z <- c tanh(z / c).
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets` `[...]` from hidden states `[..., H]` and a weight `[V, H]`.

    The product is in the dtype of its factors, as `torch.nn.Linear` makes it.
    """
    hidden = _real(hidden, (targets != IGNORED_TARGET).unsqueeze(-1))
    (logits,) = _accumulated(F.linear(hidden, weight, bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logprobs(logits, targets, temperature=temperature, return_entropy=return_entropy)


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
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    inputs: Any = (logprobs, entropy, old_logprobs, advantages, ref_logprobs, is_weights)
    inputs = _accumulated(*inputs[:2], *(None if x is None else x.detach() for x in inputs[2:]))
    inputs = (None if x is None else _real(x, mask) for x in inputs)
    logprobs, entropy, old_logprobs, advantages, ref_logprobs, is_weights = inputs
    if moments is not None:
        advantages = _real(_whiten(advantages, moments.detach()), mask)

    log_ratio = logprobs - old_logprobs
    held = log_ratio  # in the clamp
    if ratio_level == "sequence":
        held = token_means(log_ratio.detach(), mask, cu_seqlens) + (logprobs - logprobs.detach())
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
        kl = _kl_estimate(logprobs - ref_logprobs, kl_estimator)
        loss = loss + kl_coef * kl
    if entropy is not None:
        loss = loss - entropy_coef * entropy

    with torch.no_grad():
        stats = PolicyStats(
            approx_kl=_token_mean(log_ratio.square() / 2, mask),
            clip_fraction=_token_mean(is_clipped.to(loss.dtype), mask),
            ratio_mean=_token_mean(ratio, mask),
            ratio_max=_real(ratio, mask).amax() if ratio.numel() else ratio.new_zeros(()),
            kl=_token_mean(kl, mask),
            entropy=_token_mean(torch.zeros_like(loss) if entropy is None else entropy, mask),
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
    **settings: Any,
) -> tuple[Tensor, PolicyStats]:
    """`ppo_policy_loss` of `linear_logprobs` and their entropy; without old log-probs, on policy.

    Differentiable in `hidden`, `weight` and `bias`.
    """
    if mask is not None:
        targets = targets.masked_fill(~mask, IGNORED_TARGET)
    logprobs, entropy = linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
        return_entropy=True,
    )  # fmt: skip
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    return ppo_policy_loss(
        logprobs, old_logprobs, advantages, mask=mask, entropy=entropy, **settings
    )


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
        _real(x, mask) for x in _accumulated(values, old_values.detach(), returns.detach())
    )
    error_sq = (values - returns).square()
    loss, is_clipped = error_sq / 2, torch.zeros_like(mask)
    if clip_range is not None:
        clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
        clipped_sq = (clipped - returns).square()
        is_clipped = clipped_sq > error_sq
        loss = torch.where(is_clipped, clipped_sq, error_sq) / 2

    with torch.no_grad():
        return_mean = _token_mean(returns, mask)
        stats = ValueStats(
            clip_fraction=_token_mean(is_clipped.to(loss.dtype), mask),
            value_mean=_token_mean(values, mask),
            return_mean=return_mean,
            error_mean_sq=_token_mean(error_sq, mask),
            return_var=_token_mean((returns - return_mean).square(), mask),
        )
    return _reduce(loss, mask, cu_seqlens, reduction, normalizer), stats


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
        chosen, rejected, margin = _accumulated(chosen, rejected, margin.detach())
    else:
        chosen, rejected = _accumulated(chosen, rejected)
    difference, total = chosen - rejected, chosen + rejected
    loss = -F.logsigmoid(difference - (0.0 if margin is None else margin))
    loss = loss + center_coef * total * total
    with torch.no_grad():
        pairs = torch.ones_like(loss, dtype=torch.bool)
        wins = (difference > 0).to(loss.dtype) + (difference == 0).to(loss.dtype) / 2
        stats = PairwiseStats(_token_mean(wins, pairs), _token_mean(difference, pairs))
    return _token_mean(loss, pairs), stats


# The same for rankings, all ordered pairs of a prompt's responses (Ouyang et al. 2022,
# arXiv:2203.02155, eq. 1), each prompt weighing the same:
#   mean over prompts of the mean over its pairs of -log sigmoid(s_better - s_worse)
def ranking_loss(scores: Tensor, ranks: Tensor) -> tuple[Tensor, PairwiseStats]:
    """Loss (0-dim) of `[P, K]` scores; lower ranks are better, equal ones no pair, negative absent.

    A prompt without any pair does not count. The statistics are over all pairs alike.
    """
    (scores,) = _accumulated(scores)
    there = ranks >= 0
    scores = _real(scores, there)
    better = there[:, :, None] & there[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    difference = scores[:, :, None] - scores[:, None, :]
    loss = _real(-F.logsigmoid(difference), better)
    count = better.sum((1, 2))
    of_prompts = loss.sum((1, 2)) / count.clamp(min=1)
    with torch.no_grad():
        wins = (difference > 0).to(loss.dtype) + (difference == 0).to(loss.dtype) / 2
        stats = PairwiseStats(_token_mean(wins, better), _token_mean(difference, better))
    return of_prompts.sum() / (count > 0).sum().clamp(min=1), stats


# Sampling from softmax(z / T) of the top_k most likely tokens, and only the fewest of these that
# have a probability of at least top_p together (Holtzman et al. 2020, arXiv:1904.09751); tokens as
# likely as the last that is kept are kept too. The token is the first at which the cumulative
# probability, in the order of the vocabulary, exceeds a uniform number.
def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor,
    offset: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Tokens `[...]` (int64) from logits `[..., V]`, and their log-probs in what is kept.

    `offset` has the shape of the tokens, a counter each, or is a number (or 0-dim): row i then has
    the counter `offset` + i.
    """
    (logits,) = _accumulated(logits)
    z = logits.reshape(-1, logits.shape[-1]) / temperature
    if 0 < top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        descending = z.sort(dim=-1, descending=True).values
        p = descending.softmax(-1)
        kept = p.cumsum(-1) - p < top_p
        lowest = descending.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        z = z.masked_fill(z < lowest, -torch.inf)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    below = p.double().cumsum(-1)
    if isinstance(offset, Tensor) and offset.ndim:
        counters = offset.reshape(-1)
    else:
        counters = torch.arange(len(z), device=z.device) + offset
    uniform = uniform_numbers(seed, counters)[:, None] * below[:, -1:]
    last = (p > 0).long().cumsum(-1).argmax(-1)
    tokens = torch.minimum((below <= uniform).sum(-1), last)
    shape = logits.shape[:-1]
    return tokens.reshape(shape), log_p.gather(-1, tokens[:, None]).reshape(shape)


# Attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) of one query per row and head:
#   z_j = scale q k_j, capped: z <- c tanh(z / c) (Gemma 2, arXiv:2408.00118)
#   o   = sum_j e^{z_j} v_j / (sum_j e^{z_j} + e^{sink})
# over the row's keys, or the last `window` of them (Mistral 7B, arXiv:2310.06825). A key/value head
# serves several query heads (Ainslie et al. 2023, arXiv:2305.13245). The sink, one for each query
# head, is absent (-inf) or learned (gpt-oss, arXiv:2508.10925).
def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`[B, Hq, Dv]`, in the query's dtype, from `[B, Hq, D]`, keys `[B, Hkv, S, D]`, values
    `[B, Hkv, S, Dv]` and lengths `[B]`; 0 where a row has no key. New keys `[B, Hkv, D]` and values
    `[B, Hkv, Dv]` are written to the rows' last places first."""
    if new_keys is not None and new_values is not None:
        write_last(keys, lengths, new_keys)
        write_last(values, lengths, new_values)
    dtype = query.dtype
    query, keys, values, sinks = _accumulated(query, keys, values, sinks)
    rows, kv_heads, longest = keys.shape[:3]
    j = torch.arange(longest, device=keys.device)
    kept = j < lengths[:, None]
    if window is not None:
        kept = kept & (j >= lengths[:, None] - window)
    kept = kept[:, None, :, None]
    group = query.shape[1] // max(kv_heads, 1)
    query = query.reshape(rows, kv_heads, group, query.shape[-1])
    z = scale * query @ _real(keys, kept).mT
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~kept.mT, -torch.inf)
    sink = z.new_full(z.shape[:3], -torch.inf)
    if sinks is not None:
        sink = sinks.reshape(kv_heads, group).expand_as(sink)
    p = torch.cat((z, sink[..., None]), -1).softmax(-1)[..., :-1]
    return (_real(p, kept.mT) @ _real(values, kept)).flatten(1, 2).to(dtype)


def write_last(slots: Tensor, lengths: Tensor, new: Tensor) -> None:
    """Write `new` `[B, Hkv, D]` to the last places of the rows that have one."""
    rows = (lengths > 0).nonzero()[:, 0]
    slots[rows, :, lengths[rows] - 1] = new[rows].to(slots.dtype)


# Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) with decoupled weight decay (Loshchilov &
# Hutter 2019, arXiv:1711.05101, algorithm 2), for a gradient g scaled by s:
#   m <- b1 m + (1 - b1) s g
#   v <- b2 v + (1 - b2) (s g)^2
#   w <- (1 - lr wd) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
# The roundings belong to the meaning: every implementation makes these, in this order. They are
# those of torch.optim.AdamW(fused=True) on a CPU with fused multiply-add, in all of a tensor but
# the last few elements, fewer than a vector.
def adamw(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float | Tensor,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """New (weights, exp_avg, exp_avg_sq) in the weights' dtype, float32 or float64; nothing is
    changed in place. Coefficients are computed in float64, then rounded to that dtype."""

    def rounded(x: float | Tensor) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=weights.device).to(weights.dtype)

    step, learning_rate = (torch.as_tensor(x, dtype=torch.float64) for x in (step, learning_rate))
    beta1, beta2 = betas
    g = grads.to(weights.dtype) * rounded(grad_scale)
    mix = rounded(1 - beta1)
    # The second form gives exactly g for a beta1 of 0.
    c, start = (mix, exp_avg) if mix < 0.5 else (mix - 1, g)
    exp_avg = _fused(c, g - exp_avg, start)
    exp_avg_sq = _fused(rounded(1 - beta2) * g, g, rounded(beta2) * exp_avg_sq)
    root = rounded((1 - beta2**step) ** 0.5)
    size = rounded(-learning_rate / (1 - beta1**step))
    # To the nearest by way of float64; torch's own in float32 is MKL's, which rounds otherwise.
    deviation = exp_avg_sq.double().sqrt().to(weights.dtype)
    change = size * exp_avg / (deviation / root + rounded(eps))
    weights = rounded(1 - learning_rate * weight_decay) * weights + change
    return weights, exp_avg, exp_avg_sq


# Moments in 8 bits: blocks of 256 elements that lie side by side, the last may be shorter, with one
# float32 number each, the largest magnitude M in it (after Dettmers et al. 2022, arXiv:2110.02861,
# section 2). A magnitude a is kept as its code
#   round(n f(a / M)),   f(x) about x^(1/4), f(0) = 0, f(1) = 1
# n is 127 for exp_avg, with a sign, and 255 for the root of exp_avg_sq, of which none becomes 0
# that was not. f goes through float32's bits as if they were a logarithm, which they nearly are,
# and so takes no root; its inverse is exact. Near the largest, numbers change by up to 3.1 % and
# 1.6 %, at a 1e-4th of it by 20 % and 11 %. (Codes of less range, as in arXiv:2602.23349, lose
# more: bench/notes/cpu.md.)
MOMENT_BLOCK = 256
_LARGEST_MOMENT = 2.0**126  # what is beyond, or NaN, makes its block NaN
_ONE = 0x3F800000  # the bits of 1
_SHIFT = _ONE - (_ONE >> 2)


def quantize_moments(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(int8, uint8, scales float32 `[2, blocks]`) of float32 moments of one shape."""
    mean, of_mean = _quantized(exp_avg, 127)
    root, of_root = _quantized(exp_avg_sq.double().sqrt().float(), 255)  # to the nearest, as above
    root = torch.where(exp_avg_sq > 0, root.clamp(min=1), root)
    return mean.to(torch.int8), root.to(torch.uint8), torch.stack((of_mean, of_root))


def dequantize_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The float32 moments that are kept so."""
    root = _dequantized(exp_avg_sq, scales[1], 255)
    return _dequantized(exp_avg, scales[0], 127), root * root


def _quantized(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    count = x.numel()
    blocks = torch.nn.functional.pad(x.flatten(), (0, -count % MOMENT_BLOCK)).view(-1, MOMENT_BLOCK)
    # Of no block there is no largest.
    scales = blocks.abs().amax(1) if count else blocks.new_empty(0)
    scales = torch.where(scales <= _LARGEST_MOMENT, scales, torch.nan)
    # The inverse of a subnormal number may be infinite: such a block is as good as 0.
    inverse = torch.where(scales >= 2.0**-126, 1 / scales, 0.0)
    bits = (blocks.abs() * inverse[:, None]).view(torch.int32).clamp(max=_ONE)  # NaN too
    part = ((bits >> 2) + _SHIFT).view(torch.float32)
    codes = (part * most).round()
    codes = torch.where(blocks < 0, -codes, codes)
    return codes.flatten()[:count].view(x.shape), scales


def _dequantized(codes: Tensor, scales: Tensor, most: int) -> Tensor:
    part = codes.float().abs() * torch.tensor(1 / most, device=codes.device)
    bits = (part.view(torch.int32).clamp(min=_SHIFT) - _SHIFT) << 2
    scale = scales.repeat_interleave(MOMENT_BLOCK)[: codes.numel()].view(codes.shape)
    return bits.view(torch.float32).copysign(codes) * scale


# Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4):
#   y_j = x_j / sqrt(mean x^2 + eps) (w_j + added)
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    added: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`[..., D]` in `dtype`, by default that of x, from `[..., D]` and `[D]`."""
    dtype = x.dtype if dtype is None else dtype
    x, weight = _accumulated(x, weight)
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + added)).to(dtype)


# Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34) in GPT-NeoX's order: of the R
# numbers that are rotated, R as many as cosines, number i goes with number i + R/2.
#   o_i       = x_i cos_i - x_{i+R/2} sin_i                    for i < R/2
#   o_{i+R/2} = x_{i+R/2} cos_{i+R/2} + x_i sin_{i+R/2}
#   o_i       = x_i                                            for i >= R
def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query `[B, Hq, T, D]` and key `[B, Hkv, T, D]`, in their dtype, over memory ordered
    `[B, T, H, D]`; from cos and sin `[B or 1, T, R]`, which are constants."""
    return _rotated(query, cos.detach(), sin.detach()), _rotated(key, cos.detach(), sin.detach())


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = x.dtype
    x, cos, sin = _accumulated(x, cos[:, None], sin[:, None])
    half = cos.shape[-1] // 2
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    of_a = a * cos[..., :half] - b * sin[..., :half]
    of_b = b * cos[..., half:] + a * sin[..., half:]
    rotated = torch.cat((of_a, of_b, rest), -1).to(dtype)
    return rotated.transpose(1, 2).contiguous().transpose(1, 2)


# SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6), of the two products of its input:
#   y = gate sigmoid(gate) up
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`[...]` in the dtype of gate and up, both `[...]`."""
    dtype = gate.dtype
    gate, up = _accumulated(gate, up)
    return (torch.nn.functional.silu(gate) * up).to(dtype)


#   y = x W^T + b
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[..., out]` in `dtype`, from `[..., in]`, `[out, in]` and `[out]`."""
    x, weight, bias = _accumulated(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias).to(dtype)


# --------------------------------------------------------------------------------------------------


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c, in float32 rounded once: in float64 the product is exact, and a sum rounded to an
    odd last bit rounds to float32 as the exact one does (Boldo & Melquiond 2008,
    doi:10.1109/TC.2007.70819). In float64 rounded twice."""
    if c.dtype == torch.float64:
        return a * b + c
    product, c = a.double() * b.double(), c.double()
    total = product + c
    of_c = total - product
    error = (product - (total - of_c)) + (c - of_c)  # of that sum, exactly (Knuth)
    even = (total.view(torch.int64) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).double()
    odd = torch.where((error.abs() > 0) & even, torch.nextafter(total, towards), total)
    return odd.float()


def _accumulated(*tensors: Tensor | None) -> Any:
    """All of them (a tuple) in float64 if any is, else in float32."""
    given = [x for x in tensors if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask`, else exactly 0 (in value and in gradient)."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


# Estimators of KL(pi, ref) from log pi - log ref (Schulman 2020, joschu.net/blog/kl-approx.html).
def _kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', but is {estimator!r}")


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


def _token_mean(x: Tensor, mask: Tensor) -> Tensor:
    return _real(x, mask).sum() / mask.sum().clamp(min=1)

"""PPO's clipped losses: of the policy and of the value function.

Loss, statistics and the gradient of each token come out of one sweep; the backward pass only
multiplies that gradient by the incoming one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, fused_loss, reference
from ppo_kernels.fused_loss import gradient_like
from ppo_kernels.records import PolicySettings, PolicyTensors
from ppo_kernels.reference import WHITEN_EPS, PolicyStats, ValueStats

REDUCTIONS = ("token_mean", "sequence_mean", "sum")
KL_ESTIMATORS = ("k1", "k2", "k3")
OBJECTIVES = ("clip", "cispo")
RATIO_LEVELS = ("token", "sequence")
POLICY, VALUE = "ppo_policy_loss", "ppo_value_loss"


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
    impl: str = "auto",
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped policy loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    Per token w max(-A rho, -A clip(rho, 1 - low, 1 + high)) + kl_coef k(pi, pi_ref) - entropy_coef
    H, with rho = exp(log pi - log pi_old), the log-ratio clamped to +-20. Differentiable, once, in
    `logprobs` and `entropy`; all else is constant. In a tie of the two branches the gradient is the
    unclipped one's, so it is -A where pi = pi_old.

    With `ratio_level="sequence"`, GSPO (Zheng et al. 2025, arXiv:2507.18071): rho of every token of
    a sequence is s = exp(mean over its real tokens of log pi - log pi_old), the mean clamped to
    +-20. Its derivative by each token's log pi is taken as s too (GSPO-token, eq. 13 and 14), which
    makes GSPO's gradient where A is constant over a sequence.

    With `objective="cispo"`, CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5): the max(…) becomes
    -clip(rho, 1 - low, 1 + high) A log pi, the clipped ratio a constant. No token loses its
    gradient. With rho = 1 and A = 1 it is the negative log-likelihood.

    Args:
        logprobs, old_logprobs, advantages: `[B, T]`, or packed `[N]`; any floating dtypes and
            strides.
        mask: bool, shaped like `logprobs`; True is a real token. Others are never read.
        cu_seqlens: `[B + 1]` int32 or int64, where each packed sequence starts; first 0, last N.
            A packed batch needs it for "sequence_mean" and for the ratios of sequences only.
        objective: "clip", or "cispo".
        ratio_level: "token", or "sequence".
        clip_range: epsilon, or (low, high), with 0 <= low <= 1 and high >= 0; low = 1 is no lower
            bound, as no ratio is below 0.
        dual_clip: c > 1 bounds the loss by -c A where A < 0 (Ye et al. 2020, arXiv:1912.09729); of
            the objective "clip" only.
        moments: `[3]` (count, mean, M2) of the advantages, as `kl_shaped_gae` gives them: whitens
            them, (A - mean) / sqrt(M2 / count + 1e-8).
        reduction: "token_mean", "sequence_mean" (mean over the sequences that have a real token of
            each one's token mean), or "sum".
        normalizer: number or 0-dim tensor that replaces the denominator (of "sum": 1), so that the
            losses of micro-batches add up to that of the batch. A denominator of 0, as of a
            batch without any real token, counts as 1.
        entropy, entropy_coef: the entropy bonus; shaped like `logprobs`.
        ref_logprobs, kl_coef, kl_estimator: the KL penalty, by "k1", "k2" or "k3".
        is_weights: shaped like `logprobs`, multiplies each token's policy term.
        impl: "auto", or one of `implementations()["ppo_policy_loss"]`.

    Returns:
        (loss, statistics): 0-dim, float32 (float64 where an input is). The statistics are means
        over real tokens, whatever the reduction, and carry no gradient; those of the ratio are
        of the one that is used.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    choices = reduction, kl_estimator, objective, ratio_level
    check_choices(POLICY, *choices, dual_clip)
    checks.tokens(
        POLICY, mask, cu_seqlens, needs_sequences=needs_sequences(reduction, ratio_level),
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages,
        optional={"entropy": entropy, "ref_logprobs": ref_logprobs, "is_weights": is_weights},
    )  # fmt: skip
    if moments is not None:
        checks.tensor(POLICY, "moments", moments, shape=(3,), like=("logprobs", logprobs))
    given: dict[str, Any] = {
        "clip_range": clip_range, "dual_clip": dual_clip, "entropy_coef": entropy_coef,
        "kl_coef": kl_coef, "normalizer": normalizer, "reduction": reduction,
        "kl_estimator": kl_estimator, "objective": objective, "ratio_level": ratio_level,
    }  # fmt: skip
    impl = dispatch.resolve(POLICY, impl, logprobs.device)
    if impl == "reference":
        if not torch.compiler.is_compiling():
            policy_settings(POLICY, logprobs, **given)
            checks.boundaries(POLICY, cu_seqlens, logprobs.shape[0])
        return reference.ppo_policy_loss(
            logprobs, old_logprobs, advantages, mask=mask, cu_seqlens=cu_seqlens, moments=moments,
            entropy=entropy, ref_logprobs=ref_logprobs, is_weights=is_weights, **given,
        )  # fmt: skip

    tensors = PolicyTensors(
        logprobs, entropy, old_logprobs, advantages, ref_logprobs, is_weights, mask, cu_seqlens,
        moments,
    )  # fmt: skip
    wanted = fused_loss.wanted(logprobs, entropy)
    if not dispatch.eager(*tensors):
        low, high = clip_range if isinstance(clip_range, tuple | list) else (clip_range, clip_range)
        traced = (
            traced_numbers(low, high, dual_clip, entropy_coef, kl_coef),
            traced_scalar(normalizer),
        )
        loss, stats, *_ = _policy_op(*tensors, *traced, *choices, impl, *wanted)
        stats = stats.detach()
    else:
        settings = policy_settings(POLICY, logprobs, **given)
        results = policy_loss(tensors, settings, impl, *wanted)
        loss, stats = fused_loss.attach(results, (logprobs, entropy), wanted), results[1]
    return loss, PolicyStats(*stats.unbind())


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
    impl: str = "auto",
) -> tuple[Tensor, ValueStats]:
    """PPO's clipped value loss (as in openai/baselines ppo2; Ouyang et al. 2022).

    Per token max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2. Differentiable, once, in
    `values`; in a tie the gradient is the unclipped branch's.

    Args:
        values, old_values, returns: `[B, T]`, or packed `[N]`; any floating dtypes and strides.
        clip_range: c >= 0, in the units of the values; None turns the clip off.
        mask, cu_seqlens, reduction, normalizer, impl: as for `ppo_policy_loss`.

    Returns:
        (loss, statistics), as `ppo_policy_loss`.

    Raises:
        As `ppo_policy_loss`.
    """
    checks.choice(VALUE, "reduction", reduction, REDUCTIONS)
    checks.tokens(
        VALUE, mask, cu_seqlens, needs_sequences=reduction == "sequence_mean", values=values,
        old_values=old_values, returns=returns,
    )  # fmt: skip
    impl = dispatch.resolve(VALUE, impl, values.device)
    if impl == "reference":
        if not torch.compiler.is_compiling():
            _value_clip(clip_range)
            checked_normalizer(VALUE, normalizer, values)
            checks.boundaries(VALUE, cu_seqlens, values.shape[0])
        return reference.ppo_value_loss(
            values, old_values, returns, mask=mask, cu_seqlens=cu_seqlens, clip_range=clip_range,
            reduction=reduction, normalizer=normalizer,
        )  # fmt: skip

    tensors = (values, old_values, returns, mask, cu_seqlens)
    wanted = fused_loss.wanted(values)
    if not dispatch.eager(*tensors):
        traced = traced_numbers(clip_range)[0], traced_scalar(normalizer)
        loss, stats, _ = _value_op(*tensors, *traced, reduction, impl, *wanted)
        stats = stats.detach()
    else:
        numbers = _value_clip(clip_range), checked_normalizer(VALUE, normalizer, values)
        results = _value_loss(*tensors, *numbers, reduction, impl, *wanted)
        loss, stats = fused_loss.attach(results, (values,), wanted), results[1]
    return loss, ValueStats(*stats.unbind())


def check_choices(
    op: str,
    reduction: str,
    kl_estimator: str,
    objective: str,
    ratio_level: str,
    dual_clip: float | None,
) -> None:
    """The choices of a policy loss, in the order of `PolicySettings`."""
    checks.choice(op, "reduction", reduction, REDUCTIONS)
    checks.choice(op, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    checks.choice(op, "objective", objective, OBJECTIVES)
    checks.choice(op, "ratio_level", ratio_level, RATIO_LEVELS)
    if objective == "cispo" and dual_clip is not None:
        raise ValueError(
            f"{op}: dual_clip bounds the objective 'clip': it must be None with 'cispo', but is "
            f"{dual_clip!r}"
        )


def needs_sequences(reduction: str, ratio_level: str) -> bool:
    """Whether the loss depends on which tokens are one sequence."""
    return reduction == "sequence_mean" or ratio_level == "sequence"


# As the kernels take them: infinite stands for None, as also in `traced_numbers`.


def policy_settings(
    op: str,
    like: Tensor,
    *,
    clip_range: float | tuple[float, float],
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    normalizer: float | Tensor | None,
    reduction: str,
    kl_estimator: str,
    objective: str,
    ratio_level: str,
) -> PolicySettings:
    """The settings with their numbers checked; `check_choices` has seen the rest."""
    low, high = checks.clip_bounds(op, clip_range)
    bound = math.inf if dual_clip is None else checks.number(op, "dual_clip", dual_clip, gt=1.0)
    return PolicySettings(
        low=low,
        high=high,
        dual_clip=bound,
        entropy_coef=checks.number(op, "entropy_coef", entropy_coef),
        kl_coef=checks.number(op, "kl_coef", kl_coef),
        normalizer=checked_normalizer(op, normalizer, like),
        reduction=reduction,
        kl_estimator=kl_estimator,
        objective=objective,
        ratio_level=ratio_level,
    )


def _value_clip(clip_range: float | None) -> float:
    return (
        math.inf if clip_range is None else checks.number(VALUE, "clip_range", clip_range, ge=0.0)
    )


def checked_normalizer(
    op: str, normalizer: float | Tensor | None, like: Tensor
) -> float | Tensor | None:
    if normalizer is None:
        return None
    return checks.scalar(op, "normalizer", normalizer, like=("the tokens", like), ge=0.0)


def traced_numbers(*numbers: float | None) -> Tensor:
    """The numbers as one tensor, for a custom op while a graph is traced."""
    return torch.stack([dispatch.traced(math.inf if x is None else x) for x in numbers])


def traced_scalar(x: float | Tensor | None) -> Tensor | None:
    """The same of one that may be a tensor, of any device."""
    return None if x is None else dispatch.traced(x)


def untraced(x: float) -> float | None:
    return None if x == math.inf else x


# --- C++ on the CPU: csrc/cpu/ppo_loss.cpp; Triton on a GPU: triton/ppo_loss.py -------------------


def policy_loss(
    tensors: PolicyTensors,
    settings: PolicySettings,
    impl: str,
    want_logprobs: bool,
    want_entropy: bool,
) -> fused_loss.Results:
    """(loss, statistics, gradient of logprobs, of entropy)."""
    logprobs = tensors.logprobs
    checks.boundaries(POLICY, tensors.cu_seqlens, logprobs.shape[0])
    dtype, (policy, entropies, old, advantage, ref, weights) = dispatch.in_one_dtype(*tensors[:6])
    given = PolicyTensors(
        policy, entropies, old, advantage, ref, weights, tensors.mask,
        dispatch.offsets(tensors.cu_seqlens), tensors.moments,
    )  # fmt: skip
    loss, stats = outputs(logprobs, dtype, len(PolicyStats._fields))
    grad_logprobs = gradient_like(logprobs, loss, want_logprobs)
    grad_entropy = gradient_like(logprobs, loss, want_entropy)
    made = (loss, stats, grad_logprobs, grad_entropy)
    if impl == "triton":
        dispatch.triton_kernels("ppo_loss").ppo_policy_loss(given, settings, *made)
        return made
    mean, scale = 0.0, 1.0
    if given.moments is not None:
        count, mean, m2 = given.moments.tolist()
        scale = 1 / math.sqrt(m2 / max(count, 1.0) + WHITEN_EPS)
    dispatch.cpu.ppo_policy_loss(
        given.mask, given.cu_seqlens, given.logprobs, given.old_logprobs, given.advantages,
        (mean, scale), given.is_weights, (settings.low, settings.high, settings.dual_clip),
        given.entropy, settings.entropy_coef, given.ref_logprobs, settings.kl_coef,
        1 + KL_ESTIMATORS.index(settings.kl_estimator), OBJECTIVES.index(settings.objective),
        RATIO_LEVELS.index(settings.ratio_level),
        _reducing(settings.reduction, settings.normalizer), *made, torch.get_num_threads(),
    )  # fmt: skip
    return made


def _value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    clip_range: float,
    normalizer: float | Tensor | None,
    reduction: str,
    impl: str,
    want_values: bool,
) -> fused_loss.Results:
    """(loss, statistics, gradient of values)."""
    checks.boundaries(VALUE, cu_seqlens, values.shape[0])
    cu_seqlens = dispatch.offsets(cu_seqlens)
    dtype, inputs = dispatch.in_one_dtype(values, old_values, returns)
    loss, stats = outputs(values, dtype, len(ValueStats._fields))
    grad_values = gradient_like(values, loss, want_values)
    if impl == "triton":
        dispatch.triton_kernels("ppo_loss").ppo_value_loss(
            *inputs, mask, cu_seqlens, clip_range, normalizer, reduction, loss, stats, grad_values
        )
        return loss, stats, grad_values
    dispatch.cpu.ppo_value_loss(
        mask, cu_seqlens, *inputs, clip_range, _reducing(reduction, normalizer), loss, stats,
        grad_values, torch.get_num_threads(),
    )  # fmt: skip
    return loss, stats, grad_values


def _reducing(reduction: str, normalizer: float | Tensor | None) -> tuple[int, float]:
    return REDUCTIONS.index(reduction), -1.0 if normalizer is None else float(normalizer)


def outputs(like: Tensor, dtype: torch.dtype, stats: int) -> tuple[Tensor, Tensor]:
    loss = like.new_empty((), dtype=dispatch.accumulator(dtype))
    return loss, loss.new_empty(stats)


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op(
    "ppo_kernels::ppo_policy_loss", mutates_args=(), device_types=dispatch.DEVICES
)
def _policy_op(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    moments: Tensor | None,
    numbers: Tensor,
    normalizer: Tensor | None,
    reduction: str,
    kl_estimator: str,
    objective: str,
    ratio_level: str,
    impl: str,
    want_logprobs: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = PolicyTensors(
        logprobs, entropy, old_logprobs, advantages, ref_logprobs, is_weights, mask, cu_seqlens,
        moments,
    )  # fmt: skip
    low, high, dual_clip, entropy_coef, kl_coef = numbers.tolist()
    settings = policy_settings(
        POLICY, logprobs, clip_range=(low, high), dual_clip=untraced(dual_clip),
        entropy_coef=entropy_coef, kl_coef=kl_coef, normalizer=normalizer, reduction=reduction,
        kl_estimator=kl_estimator, objective=objective, ratio_level=ratio_level,
    )  # fmt: skip
    results = policy_loss(tensors, settings, impl, want_logprobs, want_entropy)
    return fused_loss.without_none(results)


@_policy_op.register_fake
def _(logprobs, *rest):  # type: ignore[no-untyped-def]
    dtype = dispatch.common_dtype(logprobs, *rest[:5])
    loss, stats = outputs(logprobs, dtype, len(PolicyStats._fields))
    gradients = (gradient_like(logprobs, loss, want) for want in rest[-2:])
    return fused_loss.without_none((loss, stats, *gradients))


@torch.library.custom_op(
    "ppo_kernels::ppo_value_loss", mutates_args=(), device_types=dispatch.DEVICES
)
def _value_op(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    clip_range: Tensor,
    normalizer: Tensor | None,
    reduction: str,
    impl: str,
    want_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    results = _value_loss(
        values, old_values, returns, mask, cu_seqlens, _value_clip(untraced(clip_range.item())),
        checked_normalizer(VALUE, normalizer, values), reduction, impl, want_values,
    )  # fmt: skip
    return fused_loss.without_none(results)


@_value_op.register_fake
def _(values, old_values, returns, *rest):  # type: ignore[no-untyped-def]
    dtype = dispatch.common_dtype(values, old_values, returns)
    loss, stats = outputs(values, dtype, len(ValueStats._fields))
    return fused_loss.without_none((loss, stats, gradient_like(values, loss, rest[-1])))


fused_loss.register(_policy_op, trained=2)
fused_loss.register(_value_op, trained=1)

"""PPO's policy loss from hidden states, with its gradients computed in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, fused_loss, ppo_loss, reference
from ppo_kernels.head import Head, weight_gradient_dtype
from ppo_kernels.linear_logprob import (
    check_head,
    check_values,
    in_own_dtypes,
    linear_logprobs,
    sweep,
    untraced_numbers,
    whole,
)
from ppo_kernels.records import PolicySettings, PolicyTensors
from ppo_kernels.reference import IGNORED_TARGET, PolicyStats
from ppo_kernels.sequences import per_token, sequence_sums

OP = "linear_ppo_loss"


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
    cu_seqlens: Tensor | None = None,
    objective: str = "clip",
    ratio_level: str = "token",
    clip_range: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    moments: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    is_weights: Tensor | None = None,
    return_logprobs: bool = False,
    impl: str = "auto",
) -> tuple[Any, ...]:
    """`ppo_policy_loss` of `linear_logprobs`, with all gradients computed in the forward pass.

    The gradient of a token's log-prob depends on that token alone, so each chunk's logits become
    their gradient at once, and that becomes those of `hidden`, `weight` and `bias`: 6 N V H
    operations in all, the logits computed once. Backward only multiplies by the incoming gradient.
    Extra memory: as `linear_logprobs`, and until backward the gradients in float32 (of a bfloat16
    weight in bfloat16 where a CPU multiplies it).

    The ratio of a sequence (`ratio_level="sequence"`) depends on all of its tokens: there it is
    those two ops, one after the other, and the backward pass recomputes the logits, 8 N V H
    operations in all. Not so without old log-probs, as every ratio is 1.

    `old_logprobs=None, objective="cispo"` and advantages of 1 make the negative log-likelihood.

    Args:
        hidden: `[B, T, H]`, or packed `[N, H]`: the state that each target is predicted from.
        weight, bias, temperature, softcap: as for `linear_logprobs`.
        targets: `[B, T]` or `[N]`; where the mask is False, anything.
        old_logprobs: shaped like the targets; or None for the log-probs of this same pass, on
            policy: then every ratio is exactly 1, and no earlier pass is needed.
        advantages and all others: as for `ppo_policy_loss`, shaped like the targets.
        return_logprobs: return the targets' log-probs too, which the loss is made of: on policy,
            those of before the update, without a pass of their own.
        impl: "auto", or one of `implementations()["linear_ppo_loss"]`.

    Returns:
        (loss, statistics), as `ppo_policy_loss`; the entropy is measured also where `entropy_coef`
        is 0. With `return_logprobs` (loss, statistics, log-probs), these shaped like the targets,
        as `linear_logprobs` has them, 0 where the mask is False, and without a gradient.

    Raises:
        As `linear_logprobs` and `ppo_policy_loss`.
    """
    weight, bias = whole(weight), whole(bias)
    dtype = check_head(OP, hidden, weight, targets, bias)
    ppo_loss.check_choices(OP, reduction, kl_estimator, objective, ratio_level, dual_clip)
    checks.tokens(
        OP, mask, cu_seqlens, needs_sequences=ppo_loss.needs_sequences(reduction, ratio_level),
        advantages=advantages,
        optional={
            "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "is_weights": is_weights,
        },
    )  # fmt: skip
    checks.tensor(OP, "advantages", advantages, shape=tuple(targets.shape), like=("hidden", hidden))
    if moments is not None:
        checks.tensor(OP, "moments", moments, shape=(3,), like=("hidden", hidden))
    impl = dispatch.resolve(OP, impl, hidden.device)
    if mask is not None:  # whatever the target is there
        targets = targets.masked_fill(~mask, IGNORED_TARGET)
    given: dict[str, Any] = {
        "clip_range": clip_range, "dual_clip": dual_clip, "entropy_coef": entropy_coef,
        "kl_coef": kl_coef, "normalizer": normalizer, "reduction": reduction,
        "kl_estimator": kl_estimator, "objective": objective, "ratio_level": ratio_level,
    }  # fmt: skip
    two_passes = ratio_level == "sequence" and old_logprobs is not None
    if impl == "reference" or two_passes:
        if not torch.compiler.is_compiling():
            check_values(OP, targets, len(weight), temperature, softcap)
            ppo_loss.policy_settings(OP, hidden, **given)
            checks.boundaries(OP, cu_seqlens, targets.shape[0])
        composed: Callable[..., Any] = (
            reference.linear_ppo_loss if impl == "reference" else partial(_two_ops, impl)
        )
        return composed(
            hidden, weight, targets, old_logprobs, advantages, bias=bias, temperature=temperature,
            softcap=softcap, mask=mask, cu_seqlens=cu_seqlens, moments=moments,
            ref_logprobs=ref_logprobs, is_weights=is_weights, return_logprobs=return_logprobs,
            **given,
        )  # fmt: skip

    trained = (hidden, weight, bias)
    tensors = (*trained, targets, old_logprobs, advantages, ref_logprobs, is_weights, mask,
               cu_seqlens, moments)  # fmt: skip
    wanted = fused_loss.wanted(*trained)
    if not dispatch.eager(*tensors):
        low, high = clip_range if isinstance(clip_range, tuple | list) else (clip_range, clip_range)
        traced = ppo_loss.traced_numbers(
            temperature, softcap, low, high, dual_clip, entropy_coef, kl_coef
        )
        loss, numbers, *_, logprobs = _loss_op(
            *tensors, traced, ppo_loss.traced_scalar(normalizer), reduction, kl_estimator,
            objective, dtype, impl, *wanted,
        )  # fmt: skip
        numbers, logprobs = numbers.detach(), logprobs.detach()
    else:
        of_head = check_values(OP, targets, len(weight), temperature, softcap)
        settings = ppo_loss.policy_settings(OP, hidden, **given)
        *results, logprobs = _loss(*tensors, of_head, settings, dtype, impl, *wanted)
        loss, numbers = fused_loss.attach(tuple(results), trained, wanted), results[1]
    stats = PolicyStats(*numbers.unbind())
    return (loss, stats, logprobs) if return_logprobs else (loss, stats)


def _two_ops(
    impl: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy_coef: float,
    return_logprobs: bool,
    **settings: Any,
) -> tuple[Any, ...]:
    """`ppo_policy_loss` of `linear_logprobs`, whose backward pass recomputes the logits."""
    logprobs, entropy = linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
        return_entropy=True, impl=impl,
    )  # fmt: skip
    if entropy_coef == 0:
        entropy = entropy.detach()  # measured, not trained
    found = ppo_loss.ppo_policy_loss(
        logprobs, old_logprobs, advantages, entropy=entropy, entropy_coef=entropy_coef,
        **settings, impl=impl,
    )  # fmt: skip
    return (*found, logprobs.detach()) if return_logprobs else found


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    moments: Tensor | None,
    of_head: tuple[float, float],
    settings: PolicySettings,
    dtype: torch.dtype,
    impl: str,
    *want: bool,
) -> fused_loss.Results:
    """(loss, statistics, gradients of hidden, weight and bias, log-probs)."""
    checks.boundaries(OP, cu_seqlens, targets.shape[0])
    # Without old log-probs all ratios are 1, those of sequences too.
    settings = settings._replace(ratio_level="token")
    with in_own_dtypes(hidden.device):
        tiled = impl == "cpp" and not any(want)
        head = Head(hidden, weight, bias, targets, dtype, want, tiled=tiled)
        denominator, weights = _denominator(
            targets, mask, cu_seqlens, settings.reduction, settings.normalizer
        )
        # float16 would lose gradients of a mean over many tokens: there the division comes last.
        late = head.dtype == torch.float16
        given = [
            None if x is None else head.pick(x)
            for x in (old_logprobs, advantages, ref_logprobs, is_weights, weights)
        ]
        of_chunk = settings._replace(normalizer=None if late else denominator, reduction="sum")

        def slopes(place: slice, log_p: Tensor, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
            old, advantage, ref, is_weight, weight = _at(place, given)
            tensors = PolicyTensors(
                log_p, h, log_p if old is None else old, advantage, ref, is_weight, mask=None,
                cu_seqlens=None, moments=moments,
            )  # fmt: skip
            *_, g, g_h = ppo_loss.policy_loss(
                tensors, of_chunk, impl, True, settings.entropy_coef != 0
            )
            if weight is not None:
                g, g_h = g * weight, None if g_h is None else g_h * weight
            return g.to(log_p.dtype), None if g_h is None else g_h.to(log_p.dtype)

        logprobs, entropy = sweep(head, *of_head, impl, slopes if any(want) else None)
        tensors = PolicyTensors(
            logprobs, entropy, logprobs if old_logprobs is None else old_logprobs, advantages,
            ref_logprobs, is_weights, mask, cu_seqlens, moments,
        )  # fmt: skip
        loss, stats, *_ = ppo_loss.policy_loss(tensors, settings, impl, False, False)
        made = head.gradients()
        if late:
            for g in made:
                if g is not None:
                    g /= denominator
    return loss, stats, *made, logprobs


def _at(place: slice, tensors: list[Tensor | None]) -> Any:
    return [None if x is None else x[place] for x in tensors]


def _denominator(
    targets: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
) -> tuple[float | Tensor, Tensor | None]:
    """The denominator of the sum of weighted token losses, and the weights (None: all 1).

    0, of a batch without any real token, counts as 1. The weights are around 1, that of a sequence
    of the mean length, as float16 has few digits for small numbers.
    """
    real = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    found: float | Tensor = 1.0
    if reduction == "token_mean":
        found = real.sum()
    if reduction != "sequence_mean":
        return _not_zero(found if normalizer is None else normalizer), None
    tokens = sequence_sums(real.long(), cu_seqlens)
    found = _not_zero((tokens > 0).sum() if normalizer is None else normalizer)
    tokens = tokens.clamp(min=1)
    usual = tokens.double().mean() if len(tokens) else 1.0
    return found * usual, per_token(usual / tokens, targets, cu_seqlens)


def _not_zero(x: float | Tensor) -> float | Tensor:
    return torch.where(x == 0, 1, x) if isinstance(x, Tensor) else x or 1.0


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op(
    "ppo_kernels::linear_ppo_loss", mutates_args=(), device_types=dispatch.DEVICES
)
def _loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor | None,
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
    dtype: torch.dtype,
    impl: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    low, high, dual_clip, entropy_coef, kl_coef = numbers[2:].tolist()
    settings = ppo_loss.policy_settings(
        OP, hidden, clip_range=(low, high), dual_clip=ppo_loss.untraced(dual_clip),
        entropy_coef=entropy_coef, kl_coef=kl_coef, normalizer=normalizer, reduction=reduction,
        kl_estimator=kl_estimator, objective=objective, ratio_level="token",
    )  # fmt: skip
    results = _loss(
        hidden, weight, bias, targets, old_logprobs, advantages, ref_logprobs, is_weights, mask,
        cu_seqlens, moments, untraced_numbers(OP, targets, weight, numbers), settings, dtype, impl,
        want_hidden, want_weight, want_bias,
    )  # fmt: skip
    return fused_loss.without_none(results)


@_loss_op.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    dtype, want = dispatch.accumulator(rest[-5]), rest[-3:]
    logprobs = hidden.new_empty(rest[0].shape, dtype=dtype)  # of the targets
    of_tokens = dispatch.common_dtype(logprobs, *rest[1:5])
    loss, stats = ppo_loss.outputs(hidden, of_tokens, len(PolicyStats._fields))
    dtypes = (dtype, weight_gradient_dtype(weight, rest[-5]), dtype)
    made = (
        dispatch.empty_like(x, of_x) if wants and x is not None else None
        for x, of_x, wants in zip((hidden, weight, bias), dtypes, want, strict=True)
    )
    return fused_loss.without_none((loss, stats, *made, logprobs))


fused_loss.register(_loss_op, trained=3)

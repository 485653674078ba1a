"""`ppo_policy_loss` and `ppo_value_loss`: loss, statistics and gradient in one sweep.

  rho = exp(clamp(log pi - log pi_old, -20, 20))
  L   = w max(-A rho, -A clip(rho, 1 - low, 1 + high)) + kl_coef k(pi, pi_ref) - entropy_coef H
        w (-clip(rho, 1 - low, 1 + high) A log pi) + … with the objective "cispo"
  L   = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2

Programs store partial sums, which a last program adds up in a fixed order.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import math

import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on, side_by_side
from ppo_kernels.records import PolicySettings, PolicyTensors
from ppo_kernels.reference import WHITEN_EPS as _WHITEN_EPS
from ppo_kernels.triton.common import (
    MAX_LOG_RATIO,
    clamp,
    exp,
    is_real,
    kl_estimate,
    load,
    number,
    places,
    read,
    write,
)  # fmt: skip
from ppo_kernels.triton.launch import OPTIONS, SIZES, TOKENS, row
from ppo_kernels.triton.sweep import LANES, Sweep, mean_weight, token_at, token_places

WHITEN_EPS = tl.constexpr(_WHITEN_EPS)
WARPS = 8
STAGES = 3  # of tiles on their way
SUMS = 512  # partial sums that are added up at a time
POLICY_SUMS, VALUE_SUMS = 8, 7  # for each program
TILE = 1024  # tokens of a sequence at a time, where its ratio is found


# --- Policy loss ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def sequence_ratios(
    logprobs, old_logprobs, mask, cu_seqlens, ratios, T: tl.int64, sequences: tl.int64,
    logprobs_row: tl.int64, old_row: tl.int64, mask_row: tl.int64, SIZE: tl.constexpr,
):  # fmt: skip
    """One sequence per program, into `[2, sequences]`: the mean log-ratio of its real tokens, and
    its ratio."""
    b = tl.program_id(0).to(tl.int64)
    first, length = T * 0, T
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + b)
        length = tl.load(cu_seqlens + b + 1) - first
    logprobs += b * logprobs_row + first
    old_logprobs += b * old_row + first
    if mask is not None:
        mask += b * mask_row + first
    sums, found = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.int32)
    for start in range(0, length, SIZE):
        t = start + tl.arange(0, SIZE)
        real = is_real(mask, t, t < length)
        log_p, old = load(logprobs, t, real, tl.float64), load(old_logprobs, t, real, tl.float64)
        sums += log_p - old
        found += real.to(tl.int32)
    count = tl.maximum(tl.sum(found).to(tl.int64), 1).to(tl.float64)
    log_ratio = tl.sum(sums) / count
    tl.store(ratios + b, log_ratio)
    tl.store(ratios + sequences + b, tl.exp(clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)))


@triton.jit(do_not_specialize=SIZES)  # but on alignment: tokens in one piece are read wide
def policy(
    logprobs, old_logprobs, advantages, mask, is_weights, entropy, ref_logprobs, moments,
    shared_ratios, cu_seqlens, row_weights, counts, denominator_pointer, grad_logprobs,
    grad_entropy, partials, count: tl.int64, T: tl.int64, sequences: tl.int64, steps: tl.int64,
    counters: tl.int64, logprobs_row: tl.int64, old_row: tl.int64, advantages_row: tl.int64,
    mask_row: tl.int64, weights_row: tl.int64, entropy_row: tl.int64, ref_row: tl.int64,
    denominator: tl.float64, low: tl.float64, high: tl.float64, dual_clip: tl.float64,
    entropy_coef: tl.float64, kl_coef: tl.float64, OBJECTIVE: tl.constexpr, DUAL: tl.constexpr,
    ESTIMATOR: tl.constexpr, LOOKUP: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
    EACH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A grid-stride loop over tiles of tokens. Masked tokens are read, as a lane's are read at
    once, and set to 0."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    SIZE: tl.constexpr = LANES * EACH
    weight = mean_weight(denominator, denominator_pointer, counts, counters).to(DTYPE)
    mean, scale = number(0.0, DTYPE), number(1.0, DTYPE)
    if moments is not None:
        mean = tl.load(moments + 1).to(DTYPE)
        n, m2 = tl.load(moments).to(tl.float64), tl.load(moments + 2).to(tl.float64)
        scale = (1.0 / tl.sqrt(m2 / tl.maximum(n, 1.0) + WHITEN_EPS)).to(DTYPE)
    low, high = 1.0 - number(low, DTYPE), 1.0 + number(high, DTYPE)
    zeros = tl.zeros((LANES,), DTYPE)
    losses, squares, clipped_count, ratios, most = zeros, zeros, zeros, zeros, zeros
    kls, entropies, reals = zeros, zeros, zeros
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    whole = count // SIZE
    for part in tl.static_range(2):  # whole tiles, and then what remains, the first program's
        ends = tl.cdiv(count, SIZE) if part else whole
        for tile in tl.range(
            whole + program if part else program, ends, programs, num_stages=1 if part else STAGES
        ):
            i = tile * SIZE + places(LANES, EACH, ALIGNED)
            inside = i < count
            b, t = token_places(i, T, cu_seqlens, sequences, steps, LOOKUP)
            log_p = read(logprobs, token_at(b, t, logprobs_row, LOOKUP), inside, part == 0).to(
                DTYPE
            )
            old = read(old_logprobs, token_at(b, t, old_row, LOOKUP), inside, part == 0).to(DTYPE)
            at = token_at(b, t, advantages_row, LOOKUP)
            advantage = read(advantages, at, inside, part == 0).to(DTYPE)
            real = inside
            if mask is not None:
                real = read(mask, token_at(b, t, mask_row, LOOKUP), inside, part == 0).to(tl.int1)
            log_ratio = tl.where(real, log_p - old, 0.0)
            advantage = tl.where(real, (advantage - mean) * scale, 0.0)
            held = log_ratio  # in the clamp
            if shared_ratios is None:
                ratio = exp(clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
            else:
                held = load(shared_ratios, b, real, DTYPE)
                ratio = load(shared_ratios, sequences + b, real, DTYPE)
            if OBJECTIVE == "cispo":
                is_clipped = real & ((ratio < low) | (ratio > high))
                slope = -advantage * clamp(ratio, low, high)
                loss = slope * tl.where(real, log_p, 0.0)
            else:
                unclipped = -advantage * ratio
                clipped = -advantage * clamp(ratio, low, high)
                is_clipped = clipped > unclipped
                loss = tl.where(is_clipped, clipped, unclipped)
                slope = tl.where(is_clipped | (tl.abs(held) > MAX_LOG_RATIO), 0.0, unclipped)
            if DUAL:
                bound = -number(dual_clip, DTYPE) * advantage
                is_bound = (advantage < 0.0) & (bound < loss)
                loss, slope = tl.where(is_bound, bound, loss), tl.where(is_bound, 0.0, slope)
            if is_weights is not None:
                w = read(is_weights, token_at(b, t, weights_row, LOOKUP), inside, part == 0).to(
                    DTYPE
                )
                loss, slope = tl.where(real, loss * w, 0.0), tl.where(real, slope * w, 0.0)
            if ref_logprobs is not None:
                ref = read(ref_logprobs, token_at(b, t, ref_row, LOOKUP), inside, part == 0).to(
                    DTYPE
                )
                k, k_slope = kl_estimate(tl.where(real, log_p - ref, 0.0), ESTIMATOR)
                kls += tl.sum(k, 1)
                loss += number(kl_coef, DTYPE) * k
                slope += tl.where(real, number(kl_coef, DTYPE) * k_slope, 0.0)
            if entropy is not None:
                h = read(entropy, token_at(b, t, entropy_row, LOOKUP), inside, part == 0).to(DTYPE)
                h = tl.where(real, h, 0.0)
                entropies += tl.sum(h, 1)
                loss -= number(entropy_coef, DTYPE) * h
            token_weight = tl.where(real, weight, 0.0)
            if row_weights is not None:
                token_weight *= tl.load(row_weights + b, mask=real, other=0.0)
            if grad_logprobs is not None:
                write(grad_logprobs, i, slope * token_weight, inside, part == 0)
            if grad_entropy is not None:
                of_entropy = -number(entropy_coef, DTYPE) * token_weight
                write(grad_entropy, i, of_entropy, inside, part == 0)
            losses += tl.sum(loss * token_weight, 1)
            squares += tl.sum(log_ratio * log_ratio, 1) * 0.5
            clipped_count += tl.sum(is_clipped.to(DTYPE), 1)
            ratio = tl.where(real, ratio, 0.0)
            ratios += tl.sum(ratio, 1)
            most = tl.maximum(most, tl.max(ratio, 1))
            reals += tl.sum(real.to(DTYPE), 1)

    partials += program
    tl.store(partials, tl.sum(losses))
    tl.store(partials + programs, tl.sum(reals))
    tl.store(partials + 2 * programs, tl.sum(squares))
    tl.store(partials + 3 * programs, tl.sum(clipped_count))
    tl.store(partials + 4 * programs, tl.sum(ratios))
    tl.store(partials + 5 * programs, tl.max(most))
    tl.store(partials + 6 * programs, tl.sum(kls))
    tl.store(partials + 7 * programs, tl.sum(entropies))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def policy_totals(partials, loss, stats, programs: tl.int64, SIZE: tl.constexpr):
    """Loss and `PolicyStats` from the partial sums."""
    zeros = tl.zeros((SIZE,), tl.float64)
    losses, reals, squares, clipped_count, ratios = zeros, zeros, zeros, zeros, zeros
    most, kls, entropies = zeros, zeros, zeros
    for start in range(0, programs, SIZE):
        p = start + tl.arange(0, SIZE)
        there = p < programs
        losses += load(partials, p, there, tl.float64)
        reals += load(partials, programs + p, there, tl.float64)
        squares += load(partials, 2 * programs + p, there, tl.float64)
        clipped_count += load(partials, 3 * programs + p, there, tl.float64)
        ratios += load(partials, 4 * programs + p, there, tl.float64)
        most = tl.maximum(most, load(partials, 5 * programs + p, there, tl.float64))
        kls += load(partials, 6 * programs + p, there, tl.float64)
        entropies += load(partials, 7 * programs + p, there, tl.float64)
    count = tl.maximum(tl.sum(reals), 1.0)
    ratio = tl.sum(ratios)
    tl.store(loss, tl.sum(losses))
    tl.store(stats, tl.sum(squares) / count)
    tl.store(stats + 1, tl.sum(clipped_count) / count)
    tl.store(stats + 2, ratio / count)
    tl.store(stats + 3, tl.where(ratio == ratio, tl.max(most), ratio))  # or NaN
    tl.store(stats + 4, tl.sum(kls) / count)
    tl.store(stats + 5, tl.sum(entropies) / count)


# --- Value loss -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)  # but on alignment: tokens in one piece are read wide
def value(
    values, old_values, returns, mask, cu_seqlens, row_weights, counts, denominator_pointer,
    grad_values, partials, count: tl.int64, T: tl.int64, sequences: tl.int64, steps: tl.int64,
    counters: tl.int64, values_row: tl.int64, old_row: tl.int64, returns_row: tl.int64,
    mask_row: tl.int64, denominator: tl.float64, clip: tl.float64, LOOKUP: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A grid-stride loop over tiles of tokens, as in `policy`; an infinite `clip` means none."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    SIZE: tl.constexpr = LANES * EACH
    weight = mean_weight(denominator, denominator_pointer, counts, counters).to(DTYPE)
    clip = number(clip, DTYPE)
    zeros = tl.zeros((LANES,), DTYPE)
    losses, clipped_count, values_sum, errors, reals = zeros, zeros, zeros, zeros, zeros
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    # Each lane sums its returns about the largest of its first: no cancellation by a large mean.
    origins = zeros
    deviations, squares = zeros, zeros
    whole = count // SIZE
    for part in tl.static_range(2):  # whole tiles, and then what remains, the first program's
        ends = tl.cdiv(count, SIZE) if part else whole
        for tile in tl.range(
            whole + program if part else program, ends, programs, num_stages=1 if part else STAGES
        ):
            i = tile * SIZE + places(LANES, EACH, ALIGNED)
            inside = i < count
            b, t = token_places(i, T, cu_seqlens, sequences, steps, LOOKUP)
            v = read(values, token_at(b, t, values_row, LOOKUP), inside, part == 0).to(DTYPE)
            old = read(old_values, token_at(b, t, old_row, LOOKUP), inside, part == 0).to(DTYPE)
            target = read(returns, token_at(b, t, returns_row, LOOKUP), inside, part == 0).to(DTYPE)
            real = inside
            if mask is not None:
                real = read(mask, token_at(b, t, mask_row, LOOKUP), inside, part == 0).to(tl.int1)
            v = tl.where(real, v, 0.0)
            error = tl.where(real, v - target, 0.0)
            clipped_error = tl.where(real, clamp(v, old - clip, old + clip) - target, 0.0)
            is_clipped = clipped_error * clipped_error > error * error
            square = tl.where(is_clipped, clipped_error * clipped_error, error * error)
            token_weight = tl.where(real, weight, 0.0)
            if row_weights is not None:
                token_weight *= tl.load(row_weights + b, mask=real, other=0.0)
            if grad_values is not None:
                slope = tl.where(is_clipped, 0.0, error * token_weight)
                write(grad_values, i, slope, inside, part == 0)
            losses += tl.sum(square * token_weight, 1) * 0.5
            clipped_count += tl.sum(is_clipped.to(DTYPE), 1)
            values_sum += tl.sum(v, 1)
            errors += tl.sum(error * error, 1)
            largest = tl.max(tl.where(real, target, float("-inf")), 1)
            origins = tl.where((reals == 0.0) & (largest > float("-inf")), largest, origins)
            d = tl.where(real, target - origins[:, None], 0.0)
            deviations += tl.sum(d, 1)
            squares += tl.sum(d * d, 1)
            reals += tl.sum(real.to(DTYPE), 1)

    partials += program
    n = tl.sum(reals)
    origin = tl.max(tl.where(reals > 0.0, origins, float("-inf")))
    origin = tl.where(origin > float("-inf"), origin, 0.0)
    apart = tl.where(reals > 0.0, origins - origin, 0.0)
    deviation = tl.sum(deviations + reals * apart)
    squares += apart * (2.0 * deviations + reals * apart)
    shift = deviation / tl.maximum(n, 1.0)
    tl.store(partials, tl.sum(losses))
    tl.store(partials + programs, n)
    tl.store(partials + 2 * programs, tl.sum(clipped_count))
    tl.store(partials + 3 * programs, tl.sum(values_sum))
    tl.store(partials + 4 * programs, tl.sum(errors))
    tl.store(partials + 5 * programs, origin + shift)
    tl.store(partials + 6 * programs, tl.sum(squares) - deviation * shift)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def value_totals(partials, loss, stats, programs: tl.int64, SIZE: tl.constexpr):
    """Loss and `ValueStats` from the partial sums."""
    # The moments of all returns from those of each program, about the mean of the first.
    origin = tl.load(partials + 5 * programs, mask=programs > 0, other=0.0).to(tl.float64)
    zeros = tl.zeros((SIZE,), tl.float64)
    losses, reals, clipped_count, values_sum, errors = zeros, zeros, zeros, zeros, zeros
    deviations, squares = zeros, zeros
    for start in range(0, programs, SIZE):
        p = start + tl.arange(0, SIZE)
        there = p < programs
        n = load(partials, programs + p, there, tl.float64)
        d = tl.where(n > 0.0, load(partials, 5 * programs + p, there, tl.float64) - origin, 0.0)
        losses += load(partials, p, there, tl.float64)
        reals += n
        clipped_count += load(partials, 2 * programs + p, there, tl.float64)
        values_sum += load(partials, 3 * programs + p, there, tl.float64)
        errors += load(partials, 4 * programs + p, there, tl.float64)
        deviations += n * d
        squares += load(partials, 6 * programs + p, there, tl.float64) + n * d * d
    count = tl.maximum(tl.sum(reals), 1.0)
    deviation = tl.sum(deviations)
    shift = deviation / count
    tl.store(loss, tl.sum(losses))
    tl.store(stats, tl.sum(clipped_count) / count)
    tl.store(stats + 1, tl.sum(values_sum) / count)
    tl.store(stats + 2, origin + shift)
    tl.store(stats + 3, tl.sum(errors) / count)
    tl.store(stats + 4, (tl.sum(squares) - deviation * shift) / count)


# --- Launches -------------------------------------------------------------------------------------


def ppo_policy_loss(
    given: PolicyTensors,
    settings: PolicySettings,
    loss: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Fill the last four arguments."""
    mask, cu_seqlens = side_by_side(given.mask), given.cu_seqlens
    tokens = (
        *map(side_by_side, (given.logprobs, given.old_logprobs, given.advantages)),
        mask,
        *map(side_by_side, (given.is_weights, given.entropy, given.ref_logprobs)),
    )
    with on(loss.device):
        of_sequences = settings.ratio_level == "sequence"
        sweep = Sweep(
            tokens, mask, cu_seqlens, settings.reduction, settings.normalizer, loss, of_sequences
        )
        ratios = None
        if of_sequences:
            ratios = loss.new_empty(2, sweep.sequences)
            if sweep.programs:
                sequence_ratios[(sweep.sequences,)](
                    *tokens[:2], mask, cu_seqlens, ratios, given.logprobs.shape[-1],
                    sweep.sequences, *map(row, tokens[:2]), row(mask), TILE, **OPTIONS,
                )  # fmt: skip
        partials = loss.new_empty(POLICY_SUMS, sweep.programs)
        if sweep.programs:
            policy[(sweep.programs,)](
                *tokens, side_by_side(given.moments), ratios, *sweep.pointers, grad_logprobs,
                grad_entropy, partials, *sweep.sizes, *map(row, tokens), sweep.denominator,
                settings.low, settings.high, settings.dual_clip, settings.entropy_coef,
                settings.kl_coef, settings.objective, settings.dual_clip != math.inf,
                settings.kl_estimator, sweep.lookup, sweep.aligned, LANES, sweep.each, STAGES,
                num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
        policy_totals[(1,)](partials, loss, stats, sweep.programs, SUMS, **OPTIONS)


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    clip_range: float,
    normalizer: float | Tensor | None,
    reduction: str,
    loss: Tensor,
    stats: Tensor,
    grad_values: Tensor | None,
) -> None:
    """Fill the last three arguments; an infinite `clip_range` means none."""
    mask = side_by_side(mask)
    tokens = (*map(side_by_side, (values, old_values, returns)), mask)
    with on(loss.device):
        sweep = Sweep(tokens, mask, cu_seqlens, reduction, normalizer, loss)
        partials = loss.new_empty(VALUE_SUMS, sweep.programs)
        if sweep.programs:
            value[(sweep.programs,)](
                *tokens, *sweep.pointers, grad_values, partials, *sweep.sizes, *map(row, tokens),
                sweep.denominator, clip_range, sweep.lookup, sweep.aligned,
                LANES, sweep.each, STAGES, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
        value_totals[(1,)](partials, loss, stats, sweep.programs, SUMS, **OPTIONS)

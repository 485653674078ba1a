"""`ppo_policy_loss` and `ppo_value_loss`: loss, statistics and gradient in one sweep.

  rho = exp(clamp(log pi - log pi_old, -20, 20))
  L   = w max(-A rho, -A clip(rho, 1 - low, 1 + high)) + kl_coef k(pi, pi_ref) - entropy_coef H
  L   = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2

A gradient needs the denominator of the mean, so where that is a number of tokens or of sequences,
these are counted first, from the mask alone. Programs leave partial sums, which a last program adds
up in a fixed order.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.reference import WHITEN_EPS as _WHITEN_EPS
from ppo_kernels.triton.common import (
    MAX_LOG_RATIO,
    clamp,
    exp,
    is_real,
    kl_estimate,
    load,
    number,
    total,
)  # fmt: skip
from ppo_kernels.triton.launch import OPTIONS, SIZES, TOKENS, on, row, side_by_side

WHITEN_EPS = tl.constexpr(_WHITEN_EPS)
TILE, TILES = 512, 8  # tokens at a time, and how many times in a program
WARPS = 8  # 2 tokens a thread: of 4, some registers would be spilled
COUNTERS = tl.constexpr(256)  # programs that count, at most
SUMS = 1024  # partial sums that are added up at a time
POLICY_SUMS, VALUE_SUMS = 8, 7  # for each program


# --- Places, weights and denominators -------------------------------------------------------------


@triton.jit
def _places(i, T, cu_seqlens, sequences, steps, LOOKUP: tl.constexpr):
    """(sequence, place in its row) of the tokens i. A packed batch is one row; so are all rows of
    a padded one where nothing has to be looked up."""
    if not LOOKUP:
        return i * 0, i
    elif cu_seqlens is None:
        return i // T, i % T
    else:
        low, high = i * 0, i * 0 + sequences  # cu_seqlens[low] <= i < cu_seqlens[high]
        for _ in range(0, steps):
            middle = (low + high) // 2
            above = tl.load(cu_seqlens + middle) > i
            high = tl.where(above, middle, high)
            low = tl.where(above, low, middle)
        return low, i


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def weigh(mask, cu_seqlens, row_weights, T: tl.int64, mask_row: tl.int64, SIZE: tl.constexpr):
    """1 over the number of real tokens, or 0, of a sequence each."""
    b = tl.program_id(0).to(tl.int64)
    first, length = T * 0, T
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + b)
        length = tl.load(cu_seqlens + b + 1) - first
    count = length
    if mask is not None:
        mask += b * mask_row + first
        found = tl.zeros((SIZE,), tl.int32)
        for start in range(0, length, SIZE):
            t = start + tl.arange(0, SIZE)
            found += is_real(mask, t, t < length).to(tl.int32)
        count = tl.sum(found).to(tl.int64)
    share = 1.0 / tl.maximum(count, 1).to(tl.float64)
    tl.store(row_weights + b, tl.where(count > 0, share, 0.0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def count_partly(
    mask, row_weights, counts, count: tl.int64, T: tl.int64, mask_row: tl.int64,
    LOOKUP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """How many tokens are real, or else (with `row_weights`) sequences; a part each."""
    found = tl.zeros((SIZE,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * SIZE, count, tl.num_programs(0) * SIZE):
        i = start + tl.arange(0, SIZE)
        if row_weights is None:
            b, t = _places(i, T, None, 0, 0, LOOKUP)
            found += is_real(mask, b * mask_row + t, i < count).to(tl.int32)
        else:
            found += (tl.load(row_weights + i, mask=i < count, other=0.0) > 0).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found))


@triton.jit
def _weight(denominator, denominator_pointer, counts, counters):
    """1 over the denominator; in float64, as a GPU's division is none too exact in float32."""
    if counts is not None:
        p = tl.arange(0, COUNTERS)
        found = tl.sum(tl.load(counts + p, mask=p < counters, other=0).to(tl.int64)).to(tl.float64)
    elif denominator_pointer is not None:
        found = tl.load(denominator_pointer).to(tl.float64)
    else:
        found = number(denominator, tl.float64)
    return 1.0 / tl.where(found == 0.0, 1.0, found)


# --- Policy loss ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def policy(
    logprobs, old_logprobs, advantages, mask, is_weights, entropy, ref_logprobs, moments,
    cu_seqlens, row_weights, counts, denominator_pointer, grad_logprobs, grad_entropy, partials,
    count: tl.int64, T: tl.int64, sequences: tl.int64, steps: tl.int64, counters: tl.int64,
    logprobs_row: tl.int64, old_row: tl.int64, advantages_row: tl.int64, mask_row: tl.int64,
    weights_row: tl.int64, entropy_row: tl.int64, ref_row: tl.int64, denominator: tl.float64,
    low: tl.float64, high: tl.float64, dual_clip: tl.float64, entropy_coef: tl.float64,
    kl_coef: tl.float64, DUAL: tl.constexpr, ESTIMATOR: tl.constexpr, LOOKUP: tl.constexpr,
    SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """SIZE x TILES tokens each."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    weight = _weight(denominator, denominator_pointer, counts, counters).to(DTYPE)
    mean, scale = number(0.0, DTYPE), number(1.0, DTYPE)
    if moments is not None:
        mean = tl.load(moments + 1).to(DTYPE)
        n, m2 = tl.load(moments).to(tl.float64), tl.load(moments + 2).to(tl.float64)
        scale = (1.0 / tl.sqrt(m2 / tl.maximum(n, 1.0) + WHITEN_EPS)).to(DTYPE)
    low, high = 1.0 - number(low, DTYPE), 1.0 + number(high, DTYPE)
    zeros = tl.zeros((SIZE,), DTYPE)
    losses, squares, clipped_count, ratios, most = zeros, zeros, zeros, zeros, zeros
    kls, entropies, reals = zeros, zeros, zeros
    first = tl.program_id(0).to(tl.int64) * TILES * SIZE
    for start in range(first, tl.minimum(first + TILES * SIZE, count), SIZE):
        i = start + tl.arange(0, SIZE)
        inside = i < count
        b, t = _places(i, T, cu_seqlens, sequences, steps, LOOKUP)
        real = is_real(mask, b * mask_row + t, inside)
        log_p = load(logprobs, b * logprobs_row + t, real, DTYPE)
        log_ratio = log_p - load(old_logprobs, b * old_row + t, real, DTYPE)
        advantage = (load(advantages, b * advantages_row + t, real, DTYPE) - mean) * scale
        ratio = exp(clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
        unclipped = -advantage * ratio
        clipped = -advantage * clamp(ratio, low, high)
        is_clipped = real & (clipped > unclipped)
        loss = tl.where(is_clipped, clipped, unclipped)
        slope = tl.where(is_clipped | (tl.abs(log_ratio) > MAX_LOG_RATIO), 0.0, unclipped)
        if DUAL:
            bound = -number(dual_clip, DTYPE) * advantage
            is_bound = (advantage < 0.0) & (bound < loss)
            loss, slope = tl.where(is_bound, bound, loss), tl.where(is_bound, 0.0, slope)
        if is_weights is not None:
            w = load(is_weights, b * weights_row + t, real, DTYPE)
            loss, slope = loss * w, slope * w
        if ref_logprobs is not None:
            to_ref = log_p - load(ref_logprobs, b * ref_row + t, real, DTYPE)
            k, k_slope = kl_estimate(to_ref, ESTIMATOR)
            kls += k
            loss += number(kl_coef, DTYPE) * k
            slope += number(kl_coef, DTYPE) * k_slope
        if entropy is not None:
            h = load(entropy, b * entropy_row + t, real, DTYPE)
            entropies += h
            loss -= number(entropy_coef, DTYPE) * h
        token_weight = weight + zeros
        if row_weights is not None:
            token_weight *= tl.load(row_weights + b, mask=real, other=0.0)
        if grad_logprobs is not None:
            tl.store(grad_logprobs + i, tl.where(real, slope * token_weight, 0.0), mask=inside)
        if grad_entropy is not None:
            of_entropy = -number(entropy_coef, DTYPE) * token_weight
            tl.store(grad_entropy + i, tl.where(real, of_entropy, 0.0), mask=inside)
        losses += tl.where(real, loss * token_weight, 0.0)
        squares += log_ratio * log_ratio * 0.5
        clipped_count += is_clipped.to(DTYPE)
        ratio = tl.where(real, ratio, 0.0)
        ratios += ratio
        most = tl.maximum(most, ratio)
        reals += real.to(DTYPE)

    partials += tl.program_id(0)
    programs = tl.num_programs(0)
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
    tl.store(loss, total(partials, 0, programs, SIZE))
    count = tl.maximum(total(partials, 1, programs, SIZE), 1.0)
    tl.store(stats, total(partials, 2, programs, SIZE) / count)
    tl.store(stats + 1, total(partials, 3, programs, SIZE) / count)
    ratios = total(partials, 4, programs, SIZE)
    tl.store(stats + 2, ratios / count)
    most = number(0.0, partials.dtype.element_ty)
    for start in range(0, programs, SIZE):
        p = start + tl.arange(0, SIZE)
        x = tl.load(partials + 5 * programs + p, mask=p < programs, other=0.0)
        most = tl.maximum(most, tl.max(x))
    tl.store(stats + 3, tl.where(ratios == ratios, most.to(tl.float64), ratios))  # or NaN
    tl.store(stats + 4, total(partials, 6, programs, SIZE) / count)
    tl.store(stats + 5, total(partials, 7, programs, SIZE) / count)


# --- Value loss -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def value(
    values, old_values, returns, mask, cu_seqlens, row_weights, counts, denominator_pointer,
    grad_values, partials, count: tl.int64, T: tl.int64, sequences: tl.int64, steps: tl.int64,
    counters: tl.int64, values_row: tl.int64, old_row: tl.int64, returns_row: tl.int64,
    mask_row: tl.int64, denominator: tl.float64, clip: tl.float64, LOOKUP: tl.constexpr,
    SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """SIZE x TILES tokens each; an infinite `clip` is none."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    weight = _weight(denominator, denominator_pointer, counts, counters).to(DTYPE)
    clip = number(clip, DTYPE)
    zeros = tl.zeros((SIZE,), DTYPE)
    losses, clipped_count, values_sum, errors, reals = zeros, zeros, zeros, zeros, zeros
    # Of the returns, about one of them, so that a large mean cancels nothing.
    origin = number(0.0, DTYPE)
    deviations, squares = zeros, zeros
    first = tl.program_id(0).to(tl.int64) * TILES * SIZE
    for start in range(first, tl.minimum(first + TILES * SIZE, count), SIZE):
        i = start + tl.arange(0, SIZE)
        inside = i < count
        b, t = _places(i, T, cu_seqlens, sequences, steps, LOOKUP)
        real = is_real(mask, b * mask_row + t, inside)
        v = load(values, b * values_row + t, real, DTYPE)
        old = load(old_values, b * old_row + t, real, DTYPE)
        target = load(returns, b * returns_row + t, real, DTYPE)
        error = v - target
        clipped_error = clamp(v, old - clip, old + clip) - target
        is_clipped = real & (clipped_error * clipped_error > error * error)
        square = tl.where(is_clipped, clipped_error * clipped_error, error * error)
        token_weight = weight + zeros
        if row_weights is not None:
            token_weight *= tl.load(row_weights + b, mask=real, other=0.0)
        if grad_values is not None:
            slope = tl.where(real & (is_clipped == 0), error * token_weight, 0.0)
            tl.store(grad_values + i, slope, mask=inside)
        losses += tl.where(real, square * token_weight * 0.5, 0.0)
        clipped_count += is_clipped.to(DTYPE)
        values_sum += v
        errors += error * error
        if start == first:
            n = tl.sum(real.to(tl.int32)).to(tl.float64)
            origin = (tl.sum(target).to(tl.float64) / tl.maximum(n, 1.0)).to(DTYPE)
        d = tl.where(real, target - origin, 0.0)
        deviations += d
        squares += d * d
        reals += real.to(DTYPE)

    partials += tl.program_id(0)
    programs = tl.num_programs(0)
    n = tl.sum(reals)
    deviation = tl.sum(deviations)
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
    tl.store(loss, total(partials, 0, programs, SIZE))
    count = tl.maximum(total(partials, 1, programs, SIZE), 1.0)
    tl.store(stats, total(partials, 2, programs, SIZE) / count)
    tl.store(stats + 1, total(partials, 3, programs, SIZE) / count)
    # The moments of all returns from those of each program, about the mean of the first.
    origin = tl.load(partials + 5 * programs, mask=programs > 0, other=0.0).to(tl.float64)
    deviation, m2 = number(0.0, tl.float64), number(0.0, tl.float64)
    for start in range(0, programs, SIZE):
        p = start + tl.arange(0, SIZE)
        n = tl.load(partials + programs + p, mask=p < programs, other=0.0).to(tl.float64)
        mean = tl.load(partials + 5 * programs + p, mask=p < programs, other=0.0).to(tl.float64)
        own = tl.load(partials + 6 * programs + p, mask=p < programs, other=0.0).to(tl.float64)
        d = tl.where(n > 0.0, mean - origin, 0.0)
        deviation += tl.sum(n * d)
        m2 += tl.sum(own + n * d * d)
    shift = deviation / count
    tl.store(stats + 2, origin + shift)
    tl.store(stats + 3, total(partials, 4, programs, SIZE) / count)
    tl.store(stats + 4, (m2 - deviation * shift) / count)


# --- Launches -------------------------------------------------------------------------------------


class _Sweep:
    """How a loss goes over its tokens, and what it divides by; launches what counts that."""

    def __init__(
        self,
        tokens: tuple[Tensor | None, ...],
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        reduction: str,
        normalizer: float | Tensor | None,
        like: Tensor,
    ) -> None:
        first = tokens[0]
        assert first is not None
        by_sequence = reduction == "sequence_mean"
        count, length = first.numel(), first.shape[-1]
        sequences = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        in_one_piece = all(x is None or x.is_contiguous() for x in tokens)
        self.lookup = by_sequence or not in_one_piece
        self.programs = triton.cdiv(count, TILE * TILES)
        self.denominator = 1.0
        row_weights = counts = pointer = None
        counters = 0
        if by_sequence:
            row_weights = like.new_empty(sequences)
            if sequences:
                weigh[(sequences,)](
                    mask, cu_seqlens, row_weights, length, row(mask), TILE, **OPTIONS
                )
        if isinstance(normalizer, Tensor):
            pointer = normalizer
        elif normalizer is not None:
            self.denominator = normalizer
        elif by_sequence or (reduction == "token_mean" and mask is not None):
            items = sequences if by_sequence else count
            counters = min(triton.cdiv(items, TILE), COUNTERS.value)
            counts = torch.empty(max(counters, 1), dtype=torch.int32, device=like.device)
            if counters:
                count_partly[(counters,)](
                    mask, row_weights, counts, items, length, row(mask), not in_one_piece, TILE,
                    **OPTIONS,
                )  # fmt: skip
        elif reduction == "token_mean":
            self.denominator = float(count)
        steps = max(sequences, 1).bit_length()
        self.pointers = (cu_seqlens if by_sequence else None, row_weights, counts, pointer)
        self.sizes = (count, length, sequences, steps, counters)


def ppo_policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    moments: Tensor | None,
    numbers: tuple[float, ...],
    normalizer: float | Tensor | None,
    reduction: str,
    kl_estimator: str,
    loss: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Fill the last four. `numbers`: low, high, dual_clip, entropy_coef, kl_coef; an infinite
    dual_clip is none."""
    mask = side_by_side(mask)
    given = (logprobs, old_logprobs, advantages, mask, is_weights, entropy, ref_logprobs)
    tokens = tuple(map(side_by_side, given))
    with on(loss.device):
        sweep = _Sweep(tokens, mask, cu_seqlens, reduction, normalizer, loss)
        partials = loss.new_empty(POLICY_SUMS, sweep.programs)
        if sweep.programs:
            policy[(sweep.programs,)](
                *tokens, side_by_side(moments), *sweep.pointers, grad_logprobs, grad_entropy,
                partials, *sweep.sizes, *map(row, tokens), sweep.denominator, *numbers,
                numbers[2] != math.inf, kl_estimator, sweep.lookup, TILE, TILES, num_warps=WARPS,
                **OPTIONS,
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
    """Fill the last three; an infinite `clip_range` is none."""
    mask = side_by_side(mask)
    tokens = (*map(side_by_side, (values, old_values, returns)), mask)
    with on(loss.device):
        sweep = _Sweep(tokens, mask, cu_seqlens, reduction, normalizer, loss)
        partials = loss.new_empty(VALUE_SUMS, sweep.programs)
        if sweep.programs:
            value[(sweep.programs,)](
                *tokens, *sweep.pointers, grad_values, partials, *sweep.sizes, *map(row, tokens),
                sweep.denominator, clip_range, sweep.lookup, TILE, TILES, num_warps=WARPS,
                **OPTIONS,
            )  # fmt: skip
        value_totals[(1,)](partials, loss, stats, sweep.programs, SUMS, **OPTIONS)

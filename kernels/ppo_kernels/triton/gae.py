"""`gae` and `kl_shaped_gae`: one reverse pass over each sequence (arXiv:1506.02438).

  A_t = r_t - V_t + c_{t+1},   c_t = gamma V_t + gamma lam A_t

All that a token needs from its right is the carry c, which at the end of a sequence is
gamma bootstrap + score. As a function of the carry to its right, a real token's is

  c_t = u_t + gamma lam c_{t+1},   u_t = gamma lam r_t + (gamma - gamma lam) V_t,

and a masked token passes it on as is; in float64 for every dtype, so that the rounding errors of
a long sequence do not accumulate. Such functions compose, so a tile of tokens is a scan, of
the token to the right of each: reversed addresses, one further. Its inputs are read twice, the
second time from the cache.

Many rows: a program walks through the tiles of one, from the end. Few long ones would leave most of
the GPU idle: there, chunks of a row first compute their functions of the carry, and then each
composes those to its right. The moments of all rows are merged by a last program.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on, side_by_side
from ppo_kernels.triton.common import is_real, kl_estimate, load, number
from ppo_kernels.triton.launch import OPTIONS, SIZES, TOKENS, processors, row

TILE = 512  # tokens of a row at a time, where a program walks through it
CHUNK = 1024  # tokens of a long row per program
TOKENS_PER_WARP = 128  # 4 a thread: of 8, some registers would be spilled
SUMMARIES = 64  # chunks that are composed at a time
PARTIALS = 1024  # moments that are merged at a time


@triton.jit
def _tokens(
    rewards, logprobs, ref_logprobs, values, mask, end, t, inside, kl_coef,
    ESTIMATOR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(real, value, reward, KL estimate) of the tokens end + t of a sequence; 0 where not real.

    `end` is a scalar, so that the lanes' own part of an address is short.
    """
    real = inside
    if mask is not None:
        real = is_real(mask + end, t, inside)
    value = load(values + end, t, real, tl.float64)
    if ESTIMATOR is None:
        return real, value, load(rewards + end, t, real, tl.float64), value
    else:
        log_p = load(logprobs + end, t, real, DTYPE)
        log_ratio = log_p - load(ref_logprobs + end, t, real, DTYPE)
        k, _ = kl_estimate(log_ratio, ESTIMATOR)
        return real, value, -kl_coef * k.to(tl.float64), k


@triton.jit
def _then(a_right, u_right, a, u):
    """x -> a x + u after x -> a_right x + u_right."""
    return a * a_right, a * u_right + u


@triton.jit
def _functions(
    rewards, logprobs, ref_logprobs, values, mask, end, t, inside, kl_coef, gamma, gamma_lam,
    ESTIMATOR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(a, u) of the function that takes the carry at the right of the first of these tokens to that
    at the left of each: a scan, as t falls."""
    real, value, reward, _ = _tokens(
        rewards, logprobs, ref_logprobs, values, mask, end, t, inside, kl_coef, ESTIMATOR, DTYPE
    )
    u = gamma_lam * reward + (gamma - gamma_lam) * value
    a = tl.where(real, gamma_lam + value * 0.0, 1.0)
    return tl.associative_scan((a, tl.where(real, u, 0.0)), 0, _then)


@triton.jit
def _at_end(scores, bootstrap, b, gamma):
    """The carry at the end of sequence b."""
    carry = number(0.0, tl.float64)
    if bootstrap is not None:
        carry += gamma * tl.load(bootstrap + b).to(tl.float64)
    if scores is not None:
        carry += tl.load(scores + b).to(tl.float64)
    return carry


@triton.jit
def _coefficient(kl_coef, kl_coef_pointer):
    if kl_coef_pointer is None:
        return number(kl_coef, tl.float64)
    else:
        return tl.load(kl_coef_pointer).to(tl.float64)


@triton.jit
def _sequence(cu_seqlens, b, T):
    """(first token, how many) of sequence b."""
    if cu_seqlens is None:
        return T * 0, T
    else:
        first = tl.load(cu_seqlens + b)
        return first, tl.load(cu_seqlens + b + 1) - first


@triton.jit
def _results(
    rewards, logprobs, ref_logprobs, values, mask, advantages, returns, end, carry, kl_coef, gamma,
    gamma_lam, ESTIMATOR: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store those of the SIZE tokens up to `end`; returns (real, advantage, KL estimate, the carry
    at the left of them)."""
    i = tl.arange(0, SIZE)
    inside = i < tl.minimum(end, SIZE).to(tl.int32)
    a, u = _functions(
        rewards, logprobs, ref_logprobs, values, mask, end, -i, inside & (i > 0), kl_coef, gamma,
        gamma_lam, ESTIMATOR, DTYPE,
    )  # fmt: skip
    carries = a * carry + u
    real, value, reward, k = _tokens(
        rewards, logprobs, ref_logprobs, values, mask, end, -1 - i, inside, kl_coef, ESTIMATOR,
        DTYPE,
    )  # fmt: skip
    advantage = tl.where(real, reward - value + carries, 0.0)
    tl.store(advantages + end + (-1 - i), advantage, mask=inside)
    tl.store(returns + end + (-1 - i), tl.where(real, advantage + value, 0.0), mask=inside)
    carries = tl.where(real, gamma * value + gamma_lam * advantage, carries)
    carry = tl.sum(tl.where(i == SIZE - 1, carries, 0.0))
    return real, advantage.to(DTYPE), k, carry


@triton.jit
def _moments(real, x, DTYPE: tl.constexpr):
    """(count, mean, M2) of x where real; x is 0 elsewhere."""
    count = tl.sum(real.to(DTYPE))
    mean = tl.sum(x) / tl.maximum(count, 1.0)
    d = tl.where(real, x - mean, 0.0)
    return count, mean, tl.sum(d * d)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def walk(
    rewards, logprobs, ref_logprobs, values, mask, scores, bootstrap, cu_seqlens, advantages,
    returns, kl, partials, kl_coef_pointer, T: tl.int64, rewards_row: tl.int64,
    logprobs_row: tl.int64, ref_row: tl.int64, values_row: tl.int64, mask_row: tl.int64,
    out_row: tl.int64, kl_coef: tl.float64, gamma: tl.float64, gamma_lam: tl.float64,
    ESTIMATOR: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One program per sequence, which it walks through from the end."""
    DTYPE: tl.constexpr = advantages.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    first, length = _sequence(cu_seqlens, b, T)
    kl_coef = _coefficient(kl_coef, kl_coef_pointer)
    gamma, gamma_lam = number(gamma, tl.float64), number(gamma_lam, tl.float64)
    if ESTIMATOR is None:
        rewards += b * rewards_row + first
    else:
        logprobs += b * logprobs_row + first
        ref_logprobs += b * ref_row + first
    values += b * values_row + first
    if mask is not None:
        mask += b * mask_row + first
    advantages += b * out_row + first
    returns += b * out_row + first

    carry = _at_end(scores, bootstrap, b, gamma)
    zero, kl_sum = number(0.0, DTYPE), number(0.0, tl.float64)
    count, mean, m2 = zero, zero, zero
    for tile in range(0, tl.cdiv(length, SIZE)):
        real, advantage, k, carry = _results(
            rewards, logprobs, ref_logprobs, values, mask, advantages, returns,
            length - tile * SIZE, carry, kl_coef, gamma, gamma_lam, ESTIMATOR, SIZE, DTYPE,
        )  # fmt: skip
        if ESTIMATOR is not None:
            kl_sum += tl.sum(k.to(tl.float64))
            # Chan, Golub, LeVeque 1979: the moments of two sets together.
            n, tile_mean, tile_m2 = _moments(real, advantage, DTYPE)
            share = n / tl.maximum(count + n, 1.0)
            delta = tile_mean - mean
            m2 += tile_m2 + delta * delta * count * share
            mean += delta * share
            count += n
    if ESTIMATOR is not None:
        tl.store(kl + b, kl_sum)
        tl.store(partials + b * 3, count)
        tl.store(partials + b * 3 + 1, mean)
        tl.store(partials + b * 3 + 2, m2)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def summarize(
    rewards, logprobs, ref_logprobs, values, mask, cu_seqlens, summaries, kl_coef_pointer,
    T: tl.int64, chunks: tl.int64, rewards_row: tl.int64, logprobs_row: tl.int64,
    ref_row: tl.int64, values_row: tl.int64, mask_row: tl.int64, kl_coef: tl.float64,
    gamma: tl.float64, gamma_lam: tl.float64, ESTIMATOR: tl.constexpr, SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(a, u) of each chunk, `[B, chunks, 2]`, the last chunk of a sequence first."""
    b, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0).to(tl.int64) % chunks
    first, length = _sequence(cu_seqlens, b, T)
    if chunk * SIZE >= length:  # there are as many chunks as the longest sequence may have
        return
    kl_coef = _coefficient(kl_coef, kl_coef_pointer)
    if ESTIMATOR is None:
        rewards += b * rewards_row + first
    else:
        logprobs += b * logprobs_row + first
        ref_logprobs += b * ref_row + first
    values += b * values_row + first
    if mask is not None:
        mask += b * mask_row + first
    i = tl.arange(0, SIZE)
    end = length - chunk * SIZE
    inside = i < tl.minimum(end, SIZE).to(tl.int32)
    a, u = _functions(
        rewards, logprobs, ref_logprobs, values, mask, end, -1 - i, inside, kl_coef,
        number(gamma, tl.float64), number(gamma_lam, tl.float64), ESTIMATOR, DTYPE,
    )  # fmt: skip
    summaries += tl.program_id(0).to(tl.int64) * 2
    tl.store(summaries, tl.sum(tl.where(i == SIZE - 1, a, 0.0)))
    tl.store(summaries + 1, tl.sum(tl.where(i == SIZE - 1, u, 0.0)))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def finish(
    rewards, logprobs, ref_logprobs, values, mask, scores, bootstrap, cu_seqlens, summaries,
    advantages, returns, kl_partials, partials, kl_coef_pointer, T: tl.int64, chunks: tl.int64,
    rewards_row: tl.int64, logprobs_row: tl.int64, ref_row: tl.int64, values_row: tl.int64,
    mask_row: tl.int64, out_row: tl.int64, kl_coef: tl.float64, gamma: tl.float64,
    gamma_lam: tl.float64, ESTIMATOR: tl.constexpr, SIZE: tl.constexpr, SUMMARIES: tl.constexpr,
):  # fmt: skip
    """The results of each chunk, from the summaries of those to its right."""
    DTYPE: tl.constexpr = advantages.dtype.element_ty
    piece = tl.program_id(0).to(tl.int64)
    b, chunk = piece // chunks, piece % chunks
    first, length = _sequence(cu_seqlens, b, T)
    if chunk * SIZE >= length:
        if ESTIMATOR is not None:
            tl.store(kl_partials + piece, 0.0)
            for i in tl.static_range(3):
                tl.store(partials + piece * 3 + i, 0.0)
        return
    kl_coef = _coefficient(kl_coef, kl_coef_pointer)
    gamma, gamma_lam = number(gamma, tl.float64), number(gamma_lam, tl.float64)
    if ESTIMATOR is None:
        rewards += b * rewards_row + first
    else:
        logprobs += b * logprobs_row + first
        ref_logprobs += b * ref_row + first
    values += b * values_row + first
    if mask is not None:
        mask += b * mask_row + first
    advantages += b * out_row + first
    returns += b * out_row + first

    carry = _at_end(scores, bootstrap, b, gamma)
    j = tl.arange(0, SUMMARIES)
    for from_right in range(0, tl.cdiv(chunk, SUMMARIES)):
        at = from_right * SUMMARIES + j
        place = summaries + (b * chunks + at) * 2
        a = tl.load(place, mask=at < chunk, other=1.0)
        u = tl.load(place + 1, mask=at < chunk, other=0.0)
        a, u = tl.associative_scan((a, u), 0, _then)
        carry = tl.sum(tl.where(j == SUMMARIES - 1, a * carry + u, 0.0))
    real, advantage, k, _ = _results(
        rewards, logprobs, ref_logprobs, values, mask, advantages, returns, length - chunk * SIZE,
        carry, kl_coef, gamma, gamma_lam, ESTIMATOR, SIZE, DTYPE,
    )  # fmt: skip
    if ESTIMATOR is not None:
        count, mean, m2 = _moments(real, advantage, DTYPE)
        tl.store(kl_partials + piece, tl.sum(k.to(tl.float64)))
        tl.store(partials + piece * 3, count)
        tl.store(partials + piece * 3 + 1, mean)
        tl.store(partials + piece * 3 + 2, m2)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def merge(
    partials, moments, kl_partials, kl, count: tl.int64, chunks: tl.int64, SIZE: tl.constexpr
):
    """The moments of all tokens from `count` partial ones (the first program), and the KL sum of
    each sequence from those of its chunks (the others)."""
    i = tl.arange(0, SIZE)
    if tl.program_id(0) == 0:
        # About the first mean, so that a large one causes no cancellation.
        origin = tl.load(partials + 1, mask=count > 0, other=0.0).to(tl.float64)
        zero = number(0.0, tl.float64)
        n_sum, d_sum, m2_sum = zero, zero, zero
        for tile in range(0, tl.cdiv(count, SIZE)):
            at = tile * SIZE + i
            n = tl.load(partials + at * 3, mask=at < count, other=0.0).to(tl.float64)
            d = tl.load(partials + at * 3 + 1, mask=at < count, other=0.0).to(tl.float64) - origin
            m2 = tl.load(partials + at * 3 + 2, mask=at < count, other=0.0).to(tl.float64)
            n_sum += tl.sum(n)
            d_sum += tl.sum(n * d)
            m2_sum += tl.sum(m2 + n * d * d)
        shift = d_sum / tl.maximum(n_sum, 1.0)
        tl.store(moments, n_sum)
        tl.store(moments + 1, tl.where(n_sum > 0, origin + shift, 0.0))
        spread = m2_sum - d_sum * shift
        tl.store(moments + 2, tl.where(spread < 0.0, 0.0, spread))  # NaN stays
    elif kl_partials is not None:
        b = tl.program_id(0).to(tl.int64) - 1
        total = number(0.0, tl.float64)
        for tile in range(0, tl.cdiv(chunks, SIZE)):
            at = tile * SIZE + i
            kept = tl.load(kl_partials + b * chunks + at, mask=at < chunks, other=0.0)
            total += tl.sum(kept.to(tl.float64))
        tl.store(kl + b, total)


def gae(
    rewards: Tensor | None,
    scores: Tensor | None,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_estimator: str | None,
    kl_coef: float | Tensor,
    gamma: float,
    lam: float,
    advantages: Tensor,
    returns: Tensor,
    kl: Tensor | None,
    moments: Tensor | None,
) -> None:
    """Fill the last four arguments, contiguous and in the accumulation dtype; with `rewards`, only
    the first two of them."""
    device = values.device
    tokens = tuple(map(side_by_side, (rewards, logprobs, ref_logprobs, values, mask)))
    scores, bootstrap = side_by_side(scores), side_by_side(bootstrap)
    rows = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    longest = values.shape[-1]
    coefficient, pointer = (0.0, kl_coef) if isinstance(kl_coef, Tensor) else (kl_coef, None)
    numbers = (coefficient, gamma, gamma * lam)
    strides = tuple(map(row, tokens))
    out_row = row(advantages)
    chunks = triton.cdiv(longest, CHUNK)
    with on(device):
        if rows < processors(device) and longest > 8 * CHUNK:
            count, warps = rows * chunks, max(CHUNK // TOKENS_PER_WARP, 1)
            summaries = torch.empty(count, 2, dtype=torch.float64, device=device)
            accumulated = tl.float64 if advantages.dtype == torch.float64 else tl.float32
            kl_partials = None if kl is None else summaries.new_empty(count)
            partials = None if kl is None else advantages.new_empty(count, 3)
            if count:
                summarize[(count,)](
                    *tokens, cu_seqlens, summaries, pointer, longest, chunks, *strides, *numbers,
                    kl_estimator, CHUNK, accumulated, num_warps=warps, **OPTIONS,
                )  # fmt: skip
                finish[(count,)](
                    *tokens, scores, bootstrap, cu_seqlens, summaries, advantages, returns,
                    kl_partials, partials, pointer, longest, chunks, *strides, out_row, *numbers,
                    kl_estimator, CHUNK, SUMMARIES, num_warps=warps, **OPTIONS,
                )  # fmt: skip
        else:
            count, kl_partials = rows, None
            partials = None if kl is None else advantages.new_empty(count, 3)
            size = 64 if longest <= 64 else 256 if longest <= 256 else TILE
            if count:
                walk[(count,)](
                    *tokens, scores, bootstrap, cu_seqlens, advantages, returns, kl, partials,
                    pointer, longest, *strides, out_row, *numbers, kl_estimator, size,
                    num_warps=max(size // TOKENS_PER_WARP, 1), **OPTIONS,
                )  # fmt: skip
        if kl is not None:
            programs = 1 if kl_partials is None else 1 + rows
            merge[(programs,)](
                partials, moments, kl_partials, kl, count, chunks, PARTIALS, **OPTIONS
            )

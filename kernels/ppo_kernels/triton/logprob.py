"""`token_logprobs`: log-prob of the target y and entropy of softmax(z / T), one program per row.

The target is kept apart from the other classes, so that nothing cancels where it has nearly all of
the probability. In one pass over j != y, with M the largest z_j of the others (each lane has its
own, until the end), and exponents in base 2:

  d_j = (z_j - M) log2(e) / T,  S = sum 2^{d_j},  U = sum 2^{d_j} d_j

  a        = (z_y - M) / T - log S              the log-odds of y
  log p_y  = -softplus(-a),  log(1 - p_y) = -softplus(a)
  log2 p_j = d_j - log_norm,  log_norm = log2(e) (log S + softplus(a))
  H        = h(p_y) + (1 - p_y) (log S - ln 2 U / S),  h(p) = -p log p - (1 - p) log(1 - p)

The last line is the chain rule of entropy: which of y and the rest, then which of the rest.
Backward, from the saved M, log_norm, H and log p_y, for gradients g of log p_y and g_H of H:

  dz_j = -p_j (g + g_H (log p_j + H)) / T,  and g / T more at j = y

With a softcap c, z_j = c tanh(x_j / c) of the logits x_j that are read, and dx_j = dz_j (1 -
(z_j / c)^2).

What takes the time is not memory but instructions, so most logits get few: tiles without the target
need no comparison, and a lane's maximum is that of the EACH logits it has in registers.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import math

import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on
from ppo_kernels.reference import IGNORED_TARGET
from ppo_kernels.triton.common import (
    expm1,
    log_from_one,
    logit_row,
    number,
    places,
    softplus,
    tanh,
)
from ppo_kernels.triton.launch import OPTIONS, SIZES, logit_rows

IGNORED = tl.constexpr(IGNORED_TARGET)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FORWARD_BYTES, BACKWARD_BYTES = 4096, 8192  # of a row at a time; a lane takes 16
NO_MORE = tl.constexpr(-2000.0)  # 2^x is 0 there


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return softcap * tanh(x / softcap)
    else:
        return x


@triton.jit
def _summed(z, m, sums, dots, scale, ENTROPY: tl.constexpr):
    """Update the running M, S and U of each lane with these logits."""
    m_new = tl.maximum(m, tl.max(z, 1))
    # -inf as long as there is none: then use 0.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    down = tl.where(m == float("-inf"), 0.0, (m - m_safe) * scale)
    factor = tl.exp2(down)
    # Not z * scale - M * scale, one instruction less: large logits that differ little cancel.
    d = (z - m_safe[:, None]) * scale
    e = tl.exp2(d)
    if ENTROPY:
        # Not 0 times -inf, also where logits differ by more than a float holds; NaN is in e.
        dots = (dots + tl.maximum(down, NO_MORE) * sums) * factor + tl.sum(
            e * tl.maximum(d, NO_MORE), 1
        )
    return m_new, sums * factor + tl.sum(e, 1), dots


@triton.jit(do_not_specialize=SIZES)
def forward(
    logits, targets, logprobs, entropy, state, temperature: tl.float64, softcap: tl.float64, vocab,
    inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64, count: tl.int64,
    CAPPED: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row per program; `state` `[2, count]` takes M and log_norm."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    ENTROPY: tl.constexpr = entropy is not None
    SIZE: tl.constexpr = LANES * EACH
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + i)
    if y == IGNORED:
        tl.store(logprobs + i, 0.0)
        if entropy is not None:
            tl.store(entropy + i, 0.0)
        return
    logits += logit_row(i, inner, outer_stride, inner_stride)
    scale = number(LOG2_E, DTYPE) / number(temperature, DTYPE)
    cap = number(softcap, DTYPE)
    j = places(LANES, EACH, ALIGNED)
    m = tl.full((LANES,), float("-inf"), DTYPE)
    sums = tl.zeros((LANES,), DTYPE)
    dots = tl.zeros((LANES,), DTYPE)
    tiles = vocab // SIZE
    apart = tl.where((y >= 0) & (y < tiles * SIZE), y // SIZE, tiles).to(tl.int32)
    for tile in tl.range(0, tl.where(apart < tiles, tiles - 1, tiles), loop_unroll_factor=2):
        start = (tile + (tile >= apart).to(tl.int32)) * SIZE
        z = _capped(tl.load(logits + start + j).to(DTYPE), cap, CAPPED)
        m, sums, dots = _summed(z, m, sums, dots, scale, ENTROPY)
    # The target's tile, if it is not the last, and the last one, which may be shorter.
    for last in range(tl.where(apart < tiles, 0, 1), 2):
        start = tl.where(last == 0, apart, tiles) * SIZE
        others = (start + j < vocab) & (start + j != y)
        z = _capped(tl.load(logits + start + j, mask=others, other=0.0).to(DTYPE), cap, CAPPED)
        z = tl.where(others, z, float("-inf"))
        m, sums, dots = _summed(z, m, sums, dots, scale, ENTROPY)

    top = tl.max(m)
    alone = top == float("-inf")  # no other class has any probability; not so where one is NaN
    top = tl.where(alone, 0.0, top)
    down = tl.where(m == float("-inf"), 0.0, (m - top) * scale)
    factor = tl.exp2(down)
    s = tl.sum(sums * factor)
    alone = alone & (s == 0.0)
    log_s = tl.where(alone, float("-inf"), log_from_one(tl.where(alone, 1.0, s)))
    # What is not a class has no log-prob; nothing outside the row is read.
    z_y = tl.load(logits + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(DTYPE)
    z_y = _capped(z_y, cap, CAPPED)
    log_odds = (z_y - top) / number(temperature, DTYPE) - log_s
    log_p, log_rest = -softplus(-log_odds), -softplus(log_odds)
    tl.store(logprobs + i, log_p)
    if entropy is not None:
        dot = tl.sum((dots + tl.maximum(down, NO_MORE) * sums) * factor)
        of_others = tl.where(alone, 0.0, log_s - dot * LN_2 / tl.where(alone, 1.0, s))
        p, rest = tl.exp(log_p), tl.exp(log_rest)
        # p log p is 0 where p is 0.
        h = tl.where(p == 0.0, 0.0, -p * log_p) + tl.where(rest == 0.0, 0.0, -rest * log_rest)
        tl.store(entropy + i, h + tl.where(rest == 0.0, 0.0, rest * of_others))
    if state is not None:
        tl.store(state + i, top)
        # Where y is alone, any value works: the others' 2^d is 0.
        log_norm = (log_s + softplus(log_odds)) * LOG2_E
        tl.store(state + count + i, tl.where(alone, 0.0, log_norm))


@triton.jit
def _gradient(
    x, j, y, at_y, m, log_norm, scale, at_0, slope, inverse_t, softcap, ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits x at the indices j: at_0 + slope log2 p is g + g_H (log p + H)."""
    z = _capped(x, softcap, CAPPED)
    log_p = (z - m) * scale - log_norm
    p = tl.exp2(log_p)
    by = at_0
    if ENTROPY:
        by = at_0 + slope * log_p
    dz = tl.where(j == y, at_y, tl.where(p == 0.0, 0.0, -p * by * inverse_t))
    if CAPPED:
        dz *= 1.0 - (z / softcap) * (z / softcap)
    return dz


@triton.jit(do_not_specialize=SIZES)
def backward(
    logits, targets, grad_logprobs, grad_entropy, logprobs, entropy, state, grad_logits,
    temperature: tl.float64, softcap: tl.float64, vocab, inner: tl.int64, outer_stride: tl.int64,
    inner_stride: tl.int64, count: tl.int64, CAPPED: tl.constexpr, LANES: tl.constexpr,
    EACH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row per program; `grad_logits` is contiguous, `[count, vocab]`, and may be the logits."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    OUT: tl.constexpr = grad_logits.dtype.element_ty
    ENTROPY: tl.constexpr = grad_entropy is not None
    SIZE: tl.constexpr = LANES * EACH
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + i)
    g, g_h, h = number(0.0, DTYPE), number(0.0, DTYPE), number(0.0, DTYPE)
    if y != IGNORED:
        if grad_logprobs is not None:
            g = tl.load(grad_logprobs + i).to(DTYPE)
        if grad_entropy is not None:
            g_h, h = tl.load(grad_entropy + i).to(DTYPE), tl.load(entropy + i)
    j = places(LANES, EACH, ALIGNED)
    grad_logits += i * vocab
    if (g == 0.0) & (g_h == 0.0):  # nothing of the row is read
        zeros = tl.zeros((LANES, EACH), OUT)
        for start in range(0, vocab, SIZE):
            tl.store(grad_logits + start + j, zeros, mask=start + j < vocab)
        return
    logits += logit_row(i, inner, outer_stride, inner_stride)
    inverse_t = 1.0 / number(temperature, DTYPE)
    scale = number(LOG2_E, DTYPE) / number(temperature, DTYPE)
    cap = number(softcap, DTYPE)
    m, log_norm, log_p = tl.load(state + i), tl.load(state + count + i), tl.load(logprobs + i)
    # 1 - p_y without cancellation.
    at_y = -g * expm1(tl.where(log_p < -80.0, -80.0, log_p))
    if ENTROPY:
        p = tl.exp(log_p)
        at_y -= tl.where(p == 0.0, 0.0, g_h * p * (log_p + h))
    at_y *= inverse_t
    at_0, slope = g + g_h * h, g_h * LN_2
    whole = vocab // SIZE * SIZE
    for start in range(0, whole, SIZE):
        x = tl.load(logits + start + j).to(DTYPE)
        dz = _gradient(
            x, start + j, y, at_y, m, log_norm, scale, at_0, slope, inverse_t, cap, ENTROPY, CAPPED
        )
        tl.store(grad_logits + start + j, dz.to(OUT))
    if whole < vocab:
        inside = whole + j < vocab
        x = tl.load(logits + whole + j, mask=inside, other=0.0).to(DTYPE)
        dz = _gradient(
            x, whole + j, y, at_y, m, log_norm, scale, at_0, slope, inverse_t, cap, ENTROPY, CAPPED
        )
        tl.store(grad_logits + whole + j, dz.to(OUT), mask=inside)


def _tiling(logits: Tensor, rows: list[int], most: int) -> tuple[tuple[int, int, bool], int]:
    """((lanes, logits of each, whether they can be read at once), warps) of a tile: 16 bytes a
    lane, `most` bytes in all."""
    each, vocab = 16 // logits.element_size(), max(logits.shape[-1], 1)
    lanes = min(max(triton.next_power_of_2(triton.cdiv(vocab, each)), 32), most // 16)
    # By 16 elements, which is what triton checks.
    aligned = logits.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in (vocab, *rows[1:]))
    return (lanes, each, aligned), max(lanes // 32, 1)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    logprobs: Tensor,
    entropy: Tensor | None,
    state: Tensor | None,
) -> None:
    """Fill the last three arguments, contiguous, from logits whose rows are contiguous; an infinite
    softcap means none."""
    if not targets.numel():
        return
    logits, *rows = logit_rows(logits)
    tiling, warps = _tiling(logits, rows, FORWARD_BYTES)
    with on(logits.device):
        forward[(targets.numel(),)](
            logits, targets, logprobs, entropy, state, temperature, softcap, logits.shape[-1],
            *rows, targets.numel(), math.isfinite(softcap), *tiling, num_warps=warps, **OPTIONS,
        )  # fmt: skip


def token_logprobs_backward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    state: Tensor,
    grad_logits: Tensor,
) -> None:
    """Fill the last argument, contiguous."""
    if not targets.numel():
        return
    logits, *rows = logit_rows(logits)
    tiling, warps = _tiling(logits, rows, BACKWARD_BYTES)
    with on(logits.device):
        backward[(targets.numel(),)](
            logits, targets, grad_logprobs, grad_entropy, logprobs, entropy, state, grad_logits,
            temperature, softcap, logits.shape[-1], *rows, targets.numel(),
            math.isfinite(softcap), *tiling, num_warps=warps, **OPTIONS,
        )  # fmt: skip

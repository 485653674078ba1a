"""`token_logprobs`: log-prob of the target y and entropy of softmax(z / T), a program for each row.

The target is kept apart from the other classes, so that nothing cancels where it has nearly all of
the probability. With M the largest z_j of the others, over j != y, in one pass:

  d_j = (z_j - M) / T,  S = sum e^{d_j},  U = sum e^{d_j} d_j

  a        = (z_y - M) / T - log S              the log-odds of y
  log p_y  = -softplus(-a),  log(1 - p_y) = -softplus(a)
  log p_j  = d_j - log_norm,  log_norm = log S + softplus(a)
  H        = h(p_y) + (1 - p_y) (log S - U / S),  h(p) = -p log p - (1 - p) log(1 - p)

The last line is the chain rule of entropy: which of y and the rest, then which of the rest.
Backward, from the saved M, log_norm, H and log p_y, for gradients g of log p_y and g_H of H:

  dz_j = -p_j (g + g_H (log p_j + H)) / T,  and g / T more at j = y
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.reference import IGNORED_TARGET
from ppo_kernels.triton.common import expm1, log_from_one, logit_row, number, softplus
from ppo_kernels.triton.launch import OPTIONS, SIZES, logit_rows, logit_tiling, on

IGNORED = tl.constexpr(IGNORED_TARGET)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _others(
    logits, start, vocab, target, WHOLE: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr
):
    """SIZE logits from `start` on; -inf at the target and, unless all are there, after the last."""
    j = start + tl.arange(0, SIZE)
    if WHOLE:
        z = tl.load(logits + j)
    else:
        z = tl.load(logits + j, mask=j < vocab, other=float("-inf"))
    return tl.where(j == target, float("-inf"), z.to(DTYPE))


@triton.jit
def _summed(z, m, sums, dots, scale, ENTROPY: tl.constexpr):
    """The running maximum M and the sums S and U, in lanes, with these logits too."""
    m_new = tl.maximum(m, tl.max(z))
    # -inf as long as there is none: then 0 is as good.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    down = tl.where(m == float("-inf"), 0.0, (m - m_safe) * scale)
    factor = tl.where(m == float("-inf"), 0.0, tl.exp2(down))
    d = (z - m_safe) * scale
    e = tl.exp2(d)
    if ENTROPY:
        dots = (dots + down * sums) * factor + tl.where(e > 0.0, e * d, e)
    return m_new, sums * factor + e, dots


@triton.jit(do_not_specialize=SIZES)
def forward(
    logits, targets, logprobs, entropy, state, temperature: tl.float64, vocab, inner: tl.int64,
    outer_stride: tl.int64, inner_stride: tl.int64, count: tl.int64, SIZE: tl.constexpr,
):  # fmt: skip
    """A row each; `state` `[2, count]` takes M and log_norm."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    ENTROPY: tl.constexpr = entropy is not None
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + i)
    if y == IGNORED:
        tl.store(logprobs + i, 0.0)
        if entropy is not None:
            tl.store(entropy + i, 0.0)
        return
    logits += logit_row(i, inner, outer_stride, inner_stride)
    # Exponents in base 2: one multiplication less for each class.
    scale = number(LOG2_E, DTYPE) / number(temperature, DTYPE)
    m = number(float("-inf"), DTYPE)
    sums = tl.zeros((SIZE,), DTYPE)
    dots = tl.zeros((SIZE,), DTYPE)
    whole = vocab // SIZE * SIZE
    for start in range(0, whole, SIZE):
        z = _others(logits, start, vocab, y, True, SIZE, DTYPE)
        m, sums, dots = _summed(z, m, sums, dots, scale, ENTROPY)
    if whole < vocab:
        z = _others(logits, whole, vocab, y, False, SIZE, DTYPE)
        m, sums, dots = _summed(z, m, sums, dots, scale, ENTROPY)

    s = tl.sum(sums)
    alone = s == 0.0  # no other class has any probability; not so where one is NaN
    m = tl.where(alone, 0.0, m)
    log_s = tl.where(alone, float("-inf"), log_from_one(tl.where(alone, 1.0, s)))
    # What is no class has no log-prob; nothing is read beside the row.
    z_y = tl.load(logits + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(DTYPE)
    log_odds = (z_y - m) / number(temperature, DTYPE) - log_s
    log_p, log_rest = -softplus(-log_odds), -softplus(log_odds)
    tl.store(logprobs + i, log_p)
    if entropy is not None:
        of_others = tl.where(alone, 0.0, log_s - tl.sum(dots) / (tl.where(alone, 1.0, s) * LOG2_E))
        p, rest = tl.exp(log_p), tl.exp(log_rest)
        # p log p is 0 where p is 0.
        h = tl.where(p == 0.0, 0.0, -p * log_p) + tl.where(rest == 0.0, 0.0, -rest * log_rest)
        tl.store(entropy + i, h + tl.where(rest == 0.0, 0.0, rest * of_others))
    if state is not None:
        tl.store(state + i, m)
        # Where y is alone, any number does: the others' e^{d} is 0.
        tl.store(state + count + i, tl.where(alone, 0.0, log_s + softplus(log_odds)))


@triton.jit
def _gradient(z, j, y, at_y, m, log_norm, g, g_h, h, inverse_t, ENTROPY: tl.constexpr):
    """Of the logits z, at the places j."""
    log_p = (z - m) * inverse_t - log_norm
    p = tl.exp2(log_p * LOG2_E)
    by = g
    if ENTROPY:
        by = g + g_h * (log_p + h)
    return tl.where(j == y, at_y, tl.where(p == 0.0, 0.0, -p * by * inverse_t))


@triton.jit(do_not_specialize=SIZES)
def backward(
    logits, targets, grad_logprobs, grad_entropy, logprobs, entropy, state, grad_logits,
    temperature: tl.float64, vocab, inner: tl.int64, outer_stride: tl.int64,
    inner_stride: tl.int64, count: tl.int64, SIZE: tl.constexpr,
):  # fmt: skip
    """A row each; `grad_logits` is contiguous, `[count, vocab]`."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    OUT: tl.constexpr = grad_logits.dtype.element_ty
    ENTROPY: tl.constexpr = grad_entropy is not None
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + i)
    g, g_h, h = number(0.0, DTYPE), number(0.0, DTYPE), number(0.0, DTYPE)
    if y != IGNORED:
        if grad_logprobs is not None:
            g = tl.load(grad_logprobs + i).to(DTYPE)
        if grad_entropy is not None:
            g_h, h = tl.load(grad_entropy + i).to(DTYPE), tl.load(entropy + i)
    j = tl.arange(0, SIZE)
    grad_logits += i * vocab
    if (g == 0.0) & (g_h == 0.0):  # nothing of the row is read
        zeros = tl.zeros((SIZE,), OUT)
        for start in range(0, vocab, SIZE):
            tl.store(grad_logits + start + j, zeros, mask=start + j < vocab)
        return
    logits += logit_row(i, inner, outer_stride, inner_stride)
    inverse_t = 1.0 / number(temperature, DTYPE)
    m, log_norm, log_p = tl.load(state + i), tl.load(state + count + i), tl.load(logprobs + i)
    # 1 - p_y without cancellation.
    at_y = -g * expm1(tl.where(log_p < -80.0, -80.0, log_p))
    if ENTROPY:
        p = tl.exp(log_p)
        at_y -= tl.where(p == 0.0, 0.0, g_h * p * (log_p + h))
    at_y *= inverse_t
    whole = vocab // SIZE * SIZE
    for start in range(0, whole, SIZE):
        z = tl.load(logits + start + j).to(DTYPE)
        dz = _gradient(z, start + j, y, at_y, m, log_norm, g, g_h, h, inverse_t, ENTROPY)
        tl.store(grad_logits + start + j, dz.to(OUT))
    if whole < vocab:
        inside = whole + j < vocab
        z = tl.load(logits + whole + j, mask=inside, other=0.0).to(DTYPE)
        dz = _gradient(z, whole + j, y, at_y, m, log_norm, g, g_h, h, inverse_t, ENTROPY)
        tl.store(grad_logits + whole + j, dz.to(OUT), mask=inside)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    logprobs: Tensor,
    entropy: Tensor | None,
    state: Tensor | None,
) -> None:
    """Fill the last three, contiguous ones, from logits whose rows are contiguous."""
    if not targets.numel():
        return
    logits, *rows = logit_rows(logits)
    size, warps = logit_tiling(logits.shape[-1], logprobs.dtype)
    with on(logits.device):
        forward[(targets.numel(),)](
            logits, targets, logprobs, entropy, state, temperature, logits.shape[-1], *rows,
            targets.numel(), size, num_warps=warps, **OPTIONS,
        )  # fmt: skip


def token_logprobs_backward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    state: Tensor,
    grad_logits: Tensor,
) -> None:
    """Fill the last, a contiguous one."""
    if not targets.numel():
        return
    logits, *rows = logit_rows(logits)
    size, warps = logit_tiling(logits.shape[-1], logprobs.dtype)
    with on(logits.device):
        backward[(targets.numel(),)](
            logits, targets, grad_logprobs, grad_entropy, logprobs, entropy, state, grad_logits,
            temperature, logits.shape[-1], *rows, targets.numel(), size, num_warps=warps,
            **OPTIONS,
        )  # fmt: skip

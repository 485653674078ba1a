"""`sample`: a token from each row of logits, and its log-prob, one program per row.

One pass for the maximum and the sum of e^{z/T}, and one for the first token at which the running
sum exceeds u times that, u a random number. With top-k or top-p, the lowest logit that is kept is
first found by bisection, over the bits of a number: as integers, they are in the order of the
numbers.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on
from ppo_kernels.triton.common import log_from_one, logit_row, number, places
from ppo_kernels.triton.launch import OPTIONS, SIZES, logit_rows

_TILE_BYTES = 4096  # of a row at a time, in the accumulation dtype
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(logits, start, vocab, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    j = start + tl.arange(0, SIZE)
    # -0 becomes 0: the order below is that of the bits.
    return tl.load(logits + j, mask=j < vocab, other=float("-inf")).to(DTYPE) + 0.0


@triton.jit
def _ordered(z):
    """Integers in the order of the numbers."""
    if z.dtype == tl.float64:
        bits = z.to(tl.int64, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = z.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _weight(z, m, scale, lowest):
    """e^{(z - m) / T} where z is kept."""
    return tl.where(_ordered(z) >= lowest, tl.exp2((z - m) * scale), 0.0)


@triton.jit
def _kept(
    logits, vocab, m, scale, lowest, COUNT: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr
):
    """How many are kept, or their weight."""
    lanes = tl.zeros((SIZE,), DTYPE)
    for start in range(0, vocab, SIZE):
        z = _logits(logits, start, vocab, SIZE, DTYPE)
        if COUNT:
            inside = start + tl.arange(0, SIZE) < vocab
            lanes += (inside & (_ordered(z) >= lowest)).to(DTYPE)
        else:
            lanes += _weight(z, m, scale, lowest)
    return tl.sum(lanes.to(tl.float64))


@triton.jit
def _largest_and_weight(
    logits, vocab, scale, LANES: tl.constexpr, EACH: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The largest logit, and the weight of all, in one pass: each lane has its own maximum until
    the last step."""
    m = tl.full((LANES,), float("-inf"), DTYPE)
    sums = tl.zeros((LANES,), DTYPE)
    for start in range(0, vocab, LANES * EACH):
        j = start + places(LANES, EACH, ALIGNED)
        z = tl.load(logits + j, mask=j < vocab, other=float("-inf")).to(DTYPE)
        m_new = tl.maximum(m, tl.max(z, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        e = tl.exp2((z - m_safe[:, None]) * scale)
        sums = sums * tl.exp2((m - m_safe) * scale) + tl.sum(e, 1)
        m = m_new
    top = tl.max(m)
    factor = tl.where(m == float("-inf"), 0.0, tl.exp2((m - top) * scale))
    return top, tl.sum((sums * factor).to(tl.float64))


@triton.jit
def _lowest_kept(
    logits, vocab, m, scale, lowest, least, COUNT: tl.constexpr, SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The largest bound that still keeps `least`, which `lowest` does."""
    above = _ordered(number(float("inf"), DTYPE)) + 1
    while above > lowest + 1:
        middle = (lowest >> 1) + (above >> 1) + (lowest & above & 1)  # a difference might overflow
        enough = _kept(logits, vocab, m, scale, middle, COUNT, SIZE, DTYPE) >= least
        lowest = tl.where(enough, middle, lowest)
        above = tl.where(enough, above, middle)
    return lowest


@triton.jit(do_not_specialize=SIZES)
def draw(
    logits, tokens, logprobs, seed_pointer, counters, temperature: tl.float64, top_p: tl.float64,
    top_k: tl.int64, seed: tl.int64, offset: tl.int64, vocab, inner: tl.int64,
    outer_stride: tl.int64, inner_stride: tl.int64, EACH_ROWS: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row per program. `counters` are of each row with EACH_ROWS, else the first row's; without
    it, `offset` is that. `seed_pointer` replaces `seed`."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    logits += logit_row(i, inner, outer_stride, inner_stride)
    scale = number(LOG2_E, DTYPE) / number(temperature, DTYPE)

    m, weight = _largest_and_weight(logits, vocab, scale, SIZE // EACH, EACH, ALIGNED, DTYPE)
    if TOP_K or TOP_P:
        # Else a NaN of negative sign, which is ordered below all, would count in this weight alone.
        m = tl.where(weight < float("inf"), m, float("nan"))
    lowest = _ordered(number(float("-inf"), DTYPE))
    if TOP_K:
        least = number(top_k, tl.float64)
        lowest = _lowest_kept(logits, vocab, m, scale, lowest, least, True, SIZE, DTYPE)
        weight = _kept(logits, vocab, m, scale, lowest, False, SIZE, DTYPE)
    if TOP_P:
        least = number(top_p, tl.float64) * weight
        lowest = _lowest_kept(logits, vocab, m, scale, lowest, least, False, SIZE, DTYPE)
        weight = _kept(logits, vocab, m, scale, lowest, False, SIZE, DTYPE)

    if seed_pointer is not None:
        seed = tl.load(seed_pointer)
    if EACH_ROWS:
        counter = tl.load(counters + i)
    elif counters is not None:
        counter = tl.load(counters) + i
    else:
        counter = offset + i
    none = (counter * 0).to(tl.uint32)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, none, none)
    goal = word.to(tl.float64) * 2.3283064365386963e-10 * weight  # 2^-32

    token = vocab + i * 0
    last = i * 0  # the last one that can be drawn, where rounding keeps the sum below the goal
    passed = number(0.0, tl.float64)
    start = i * 0
    while (token == vocab) & (start < vocab):
        z = _logits(logits, start, vocab, SIZE, DTYPE)
        e = _weight(z, m, scale, lowest)
        j = start + tl.arange(0, SIZE)
        last = tl.maximum(last, tl.max(tl.where(e > 0.0, j, 0)))
        running = passed + tl.cumsum(e.to(tl.float64), 0)
        over = (running > goal) & (e > 0.0)
        token = tl.minimum(token, tl.min(tl.where(over, j, vocab)))
        passed += tl.sum(e.to(tl.float64))
        start += SIZE
    token = tl.where(token == vocab, last, token)
    token = tl.where(weight < float("inf"), token, 0)  # NaN, too
    tl.store(tokens + i, token)
    d = (tl.load(logits + token).to(DTYPE) - m) / number(temperature, DTYPE)
    tl.store(logprobs + i, d - log_from_one(weight.to(DTYPE)))


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | Tensor,
    offset: int,
    counters: Tensor | None,
    tokens: Tensor,
    logprobs: Tensor,
) -> None:
    """Fill the last two arguments, contiguous. `counters`, contiguous, replaces `offset`."""
    if not tokens.numel():
        return
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    logits, *rows = logit_rows(logits)
    vocab = logits.shape[-1]
    # The running sums take registers: with more logits a thread, some would be spilled.
    size = min(max(triton.next_power_of_2(vocab), 64), _TILE_BYTES // logprobs.element_size())
    warps = 8 if size * logprobs.element_size() >= 4096 else 4
    each = 16 // logits.element_size()
    aligned = logits.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in (vocab, *rows[1:]))
    number, seed_pointer = (0, seed) if isinstance(seed, Tensor) else (seed, None)
    of_each = counters is not None and counters.ndim > 0
    with on(logits.device):
        draw[(tokens.numel(),)](
            logits, tokens, logprobs, seed_pointer, counters, temperature, top_p, top_k, number,
            offset, vocab, *rows, of_each, 0 < top_k < vocab, top_p < 1.0, size, each, aligned,
            num_warps=warps, **OPTIONS,
        )  # fmt: skip

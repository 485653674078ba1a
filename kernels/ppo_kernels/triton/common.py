"""What the kernels share: token loads, accurate functions, estimates of the KL divergence."""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import triton
import triton.language as tl

from ppo_kernels.reference import MAX_LOG_RATIO as _MAX_LOG_RATIO

MAX_LOG_RATIO = tl.constexpr(_MAX_LOG_RATIO)


@triton.jit
def number(x, DTYPE: tl.constexpr):
    """An argument as a scalar of DTYPE, also in the interpreter, where it is a Python number."""
    return tl.full((), x, DTYPE)


@triton.jit
def load(pointer, offsets, keep, DTYPE: tl.constexpr):
    """Load in DTYPE; 0, without reading, where not `keep`."""
    return tl.load(pointer + offsets, mask=keep, other=0.0).to(DTYPE)


@triton.jit
def places(LANES: tl.constexpr, EACH: tl.constexpr, ALIGNED: tl.constexpr):
    """[LANES, EACH]: 0, 1, 2, …, laid out so that a lane's EACH are in one thread. ALIGNED:
    adjacent, to be read at once; else so that a warp's are adjacent."""
    if ALIGNED:
        return tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    else:
        return tl.arange(0, LANES)[:, None] + tl.arange(0, EACH)[None, :] * LANES


@triton.jit
def read(pointer, offsets, inside, WHOLE: tl.constexpr):
    """Load what is inside (all, with WHOLE), 0 outside."""
    if WHOLE:
        return tl.load(pointer + offsets)
    else:
        return tl.load(pointer + offsets, mask=inside, other=0)


@triton.jit
def write(pointer, offsets, x, inside, WHOLE: tl.constexpr):
    """Store `x` at the positions that `read` loads."""
    if WHOLE:
        tl.store(pointer + offsets, x)
    else:
        tl.store(pointer + offsets, x, mask=inside)


@triton.jit
def logit_row(i, inner, outer_stride, inner_stride):
    """Where row i of logits begins; see `launch.logit_rows`."""
    return i // inner * outer_stride + i % inner * inner_stride


@triton.jit
def is_real(mask, offsets, inside):
    """Whether tokens are inside and, where there is a mask, unmasked."""
    if mask is None:
        return inside
    else:
        return tl.load(mask + offsets, mask=inside, other=0).to(tl.int1)


@triton.jit
def exp(x):
    """e^x to about 2 ulp, for |x| <= 87 (in float64, 700).

    In float32, x is first brought near 0 (Cody and Waite 1980): the hardware's 2^y has the absolute
    error of y, which is large where x is.
    """
    if x.dtype == tl.float32:
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = x - n * 0.693145751953125  # 11 bits of log 2: the product is exact
        return tl.exp2(n) * tl.exp(r - n * 1.42860677e-06)
    else:
        return tl.exp(x)


@triton.jit
def _exp_tail(x):
    """e^x - 1 - x for |x| <= 1/2, by its series."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 9
    tail = x * (1.0 / TERMS)
    for i in tl.static_range(TERMS - 1, 2, -1):
        tail = (tail + 1.0) * (x * (1.0 / i))
    return (tail + 1.0) * x * x * 0.5


@triton.jit
def expm1(x):
    """e^x - 1, accurate near 0."""
    near = tl.abs(x) < 0.5
    return tl.where(near, x + _exp_tail(tl.where(near, x, 0.0)), exp(x) - 1.0)


@triton.jit
def tanh(x):
    """tanh by e^(-2|x|) - 1, which loses no digits near 0."""
    size = tl.abs(x)
    size = tl.where(size > 40.0, 40.0, size)  # NaN stays
    e = expm1(-2.0 * size)
    y = -e / (e + 2.0)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], as 2 atanh(x / (2 + x)) by its series."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    f = x / (2.0 + x)
    square = f * f
    series = square * 0.0 + 1.0 / (2 * TERMS + 1)
    for i in tl.static_range(TERMS - 1, -1, -1):
        series = series * square + 1.0 / (2 * i + 1)
    return 2.0 * f * series


@triton.jit
def log_from_one(x):
    """log x for x >= 1."""
    near = x < 2.0
    return tl.where(near, log1p(tl.where(near, x - 1.0, 0.0)), tl.log(x))


@triton.jit
def furthest(x):
    """Beyond, e^-x is as good as 0."""
    return 700.0 if x.dtype == tl.float64 else 87.0


@triton.jit
def softplus(x):
    """log(1 + e^x), accurate for large x of either sign."""
    far = tl.abs(x) > furthest(x)
    return tl.maximum(x, 0.0) + log1p(tl.where(far, 0.0, exp(tl.where(far, 0.0, -tl.abs(x)))))


# Schulman 2020, joschu.net/blog/kl-approx.html.
@triton.jit
def kl_estimate(log_ratio, ESTIMATOR: tl.constexpr):
    """(k, its derivative) at log pi - log pi_ref."""
    if ESTIMATOR == "k1":
        return log_ratio, log_ratio * 0.0 + 1.0
    elif ESTIMATOR == "k2":
        return log_ratio * log_ratio * 0.5, log_ratio
    else:
        x = clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        near = tl.abs(x) < 0.5
        tail = _exp_tail(tl.where(near, -x, 0.0))
        inverse = exp(-x)
        k = tl.where(near, tail, inverse - 1.0 + x)
        slope = tl.where(near, x - tail, 1.0 - inverse)
        return k, tl.where(tl.abs(log_ratio) > MAX_LOG_RATIO, 0.0, slope)


@triton.jit
def clamp(x, low, high):
    """`x` within [low, high]; NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def total(partials, column, programs, SIZE: tl.constexpr):
    """The sum of one column of the partial sums `[columns, programs]`, in float64 and in order."""
    found = number(0.0, tl.float64)
    for start in range(0, programs, SIZE):
        p = start + tl.arange(0, SIZE)
        x = tl.load(partials + column * programs + p, mask=p < programs, other=0.0)
        found += tl.sum(x.to(tl.float64))
    return found

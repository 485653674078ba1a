"""`pairwise_loss`: loss, gradients and statistics in one sweep.

  mean of -log sigmoid(s+ - s- - margin) + center_coef (s+ + s-)^2

Programs leave partial sums, which a last program adds up in a fixed order.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.triton.common import exp, load, number, softplus, total
from ppo_kernels.triton.launch import OPTIONS, SIZES, on

TILE = 1024
SUMS = 1024  # partial sums that are added up at a time
COLUMNS = 3  # for each program


@triton.jit(do_not_specialize=SIZES)
def pairs(
    chosen, rejected, margins, grad_chosen, grad_rejected, partials, count: tl.int64,
    margin: tl.float64, center_coef: tl.float64, SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE pairs each."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < count
    center = number(center_coef, DTYPE)
    share = 1.0 / number(count, DTYPE)
    s_chosen, s_rejected = load(chosen, i, inside, DTYPE), load(rejected, i, inside, DTYPE)
    difference, both = s_chosen - s_rejected, s_chosen + s_rejected
    ahead = difference - number(margin, DTYPE)
    if margins is not None:
        ahead -= load(margins, i, inside, DTYPE)
    loss = softplus(-ahead) + center * both * both
    # d/dx of -log sigmoid(x) is -sigmoid(-x) = -e^{-softplus(x)}.
    slope = -exp(tl.where(ahead > 80.0, -80.0, -softplus(ahead)))
    slope = tl.where(ahead > 80.0, 0.0, slope)
    if grad_chosen is not None:
        tl.store(grad_chosen + i, (slope + 2.0 * center * both) * share, mask=inside)
    if grad_rejected is not None:
        tl.store(grad_rejected + i, (2.0 * center * both - slope) * share, mask=inside)
    wins = (difference > 0.0).to(DTYPE) + (difference == 0.0).to(DTYPE) * 0.5
    partials += tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partials, tl.sum(tl.where(inside, loss, 0.0)))
    tl.store(partials + programs, tl.sum(tl.where(inside, wins, 0.0)))
    tl.store(partials + 2 * programs, tl.sum(difference))


@triton.jit(do_not_specialize=SIZES)
def totals(partials, loss, stats, programs: tl.int64, count: tl.int64, SIZE: tl.constexpr):
    """Loss and `PairwiseStats`, means over `count`."""
    share = 1.0 / tl.maximum(number(count, tl.float64), 1.0)
    tl.store(loss, total(partials, 0, programs, SIZE) * share)
    tl.store(stats, total(partials, 1, programs, SIZE) * share)
    tl.store(stats + 1, total(partials, 2, programs, SIZE) * share)


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None,
    margin: float,
    center_coef: float,
    loss: Tensor,
    stats: Tensor,
    grad_chosen: Tensor | None,
    grad_rejected: Tensor | None,
) -> None:
    """Fill the last four, contiguous ones."""
    count = len(chosen)
    programs = triton.cdiv(count, TILE)
    partials = loss.new_empty(COLUMNS, programs)
    with on(loss.device):
        if programs:
            pairs[(programs,)](
                chosen.contiguous(), rejected.contiguous(),
                None if margins is None else margins.contiguous(), grad_chosen, grad_rejected,
                partials, count, margin, center_coef, TILE, **OPTIONS,
            )  # fmt: skip
        totals[(1,)](partials, loss, stats, programs, count, SUMS, **OPTIONS)

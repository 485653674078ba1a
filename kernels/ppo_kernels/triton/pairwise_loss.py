"""`pairwise_loss` and `ranking_loss`: loss, gradients and statistics in one sweep.

  mean of -log sigmoid(s+ - s- - margin) + center_coef (s+ + s-)^2
  mean over prompts of the mean over its pairs of -log sigmoid(s_better - s_worse)

Programs leave partial sums, which a last program adds up in a fixed order.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.triton.common import exp, furthest, load, number, softplus, total
from ppo_kernels.triton.launch import OPTIONS, SIZES, TOKENS, on, row, side_by_side

TILE = 1024
SUMS = 1024  # partial sums that are added up at a time
COLUMNS, RANKING_COLUMNS = 3, 4  # for each program
COUNTERS = 256  # programs that count, at most


@triton.jit
def sigmoid_of_minus(x):
    """sigmoid(-x) = e^{-softplus(x)}, accurate where it is small."""
    far = x > furthest(x)
    return tl.where(far, 0.0, exp(tl.where(far, 0.0, -softplus(x))))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
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
    slope = -sigmoid_of_minus(ahead)  # d/dx of -log sigmoid(x)
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


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
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


# --- Rankings -------------------------------------------------------------------------------------


@triton.jit
def _ranks(ranks, candidates, SIZE: tl.constexpr):
    """The ranks of a prompt's responses; -1 is absent."""
    j = tl.arange(0, SIZE)
    return tl.load(ranks + j, mask=j < candidates, other=-1).to(tl.int64)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def count_ranked(
    ranks, counts, prompts: tl.int64, candidates: tl.int64, ranks_row: tl.int64, SIZE: tl.constexpr
):
    """How many prompts have any pair; a part each."""
    found = number(0, tl.int32)
    for first in range(0, prompts, tl.num_programs(0)):
        prompt = first + tl.program_id(0).to(tl.int64)
        r = _ranks(ranks + prompt * ranks_row, tl.where(prompt < prompts, candidates, 0), SIZE)
        lowest = tl.min(tl.where(r >= 0, r, 2**62))
        found += tl.max((r > lowest).to(tl.int32))
    tl.store(counts + tl.program_id(0), found)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def rankings(
    scores, ranks, counts, grad_scores, partials, prompts: tl.int64, candidates: tl.int64,
    counters: tl.int64, scores_row: tl.int64, ranks_row: tl.int64, SIZE: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    """A prompt each: one response against all others at a time."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    prompt = tl.program_id(0).to(tl.int64)
    scores += prompt * scores_row
    ranks += prompt * ranks_row
    j = tl.arange(0, SIZE)
    r = _ranks(ranks, candidates, SIZE)
    s = load(scores, j, r >= 0, DTYPE)
    lanes = tl.zeros((SIZE,), DTYPE)
    losses, slopes, wins, margins, pairs_of = lanes, lanes, lanes, lanes, lanes
    for i in range(0, candidates):
        own_rank = tl.load(ranks + i).to(tl.int64)
        is_worse = (own_rank >= 0) & (r > own_rank)
        difference = tl.load(scores + i, mask=own_rank >= 0, other=0.0).to(DTYPE) - s
        losses += tl.where(is_worse, softplus(-difference), 0.0)
        wins += tl.where(is_worse & (difference > 0.0), 1.0, 0.0)
        wins += tl.where(is_worse & (difference == 0.0), 0.5, 0.0)
        margins += tl.where(is_worse, difference, 0.0)
        pairs_of += tl.where(is_worse, 1.0, 0.0)
        slope = tl.where(is_worse, sigmoid_of_minus(difference), 0.0)
        slopes += slope - tl.where(j == i, tl.sum(slope), 0.0)
    p = tl.arange(0, COUNTERS)
    prompts_ranked = tl.sum(tl.load(counts + p, mask=p < counters, other=0)).to(DTYPE)
    count = tl.sum(pairs_of)
    weight = 1.0 / (tl.maximum(prompts_ranked, 1.0) * tl.maximum(count, 1.0))
    if grad_scores is not None:
        tl.store(grad_scores + prompt * candidates + j, slopes * weight, mask=j < candidates)
    partials += prompt
    tl.store(partials, tl.sum(losses) * weight)
    tl.store(partials + prompts, count)
    tl.store(partials + 2 * prompts, tl.sum(wins))
    tl.store(partials + 3 * prompts, tl.sum(margins))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def ranking_totals(partials, loss, stats, prompts: tl.int64, SIZE: tl.constexpr):
    """Loss, and `PairwiseStats` over all pairs."""
    tl.store(loss, total(partials, 0, prompts, SIZE))
    count = tl.maximum(total(partials, 1, prompts, SIZE), 1.0)
    tl.store(stats, total(partials, 2, prompts, SIZE) / count)
    tl.store(stats + 1, total(partials, 3, prompts, SIZE) / count)


def ranking_loss(
    scores: Tensor, ranks: Tensor, loss: Tensor, stats: Tensor, grad_scores: Tensor | None
) -> None:
    """Fill the last three, contiguous ones."""
    given = side_by_side(scores), side_by_side(ranks)
    prompts, candidates = scores.shape
    rows = tuple(map(row, given))
    size = triton.next_power_of_2(max(candidates, 1))
    counters = min(prompts, COUNTERS)
    counts = torch.empty(max(counters, 1), dtype=torch.int32, device=loss.device)
    partials = loss.new_empty(RANKING_COLUMNS, prompts)
    with on(loss.device):
        if prompts:
            count_ranked[(counters,)](
                given[1], counts, prompts, candidates, rows[1], size, num_warps=1, **OPTIONS
            )
            rankings[(prompts,)](
                *given, counts, grad_scores, partials, prompts, candidates, counters, *rows,
                size, COUNTERS, num_warps=1, **OPTIONS,
            )  # fmt: skip
        ranking_totals[(1,)](partials, loss, stats, prompts, SUMS, **OPTIONS)

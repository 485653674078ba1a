"""`pairwise_loss` and `ranking_loss`: loss, gradients and statistics in one sweep.

  mean of -log sigmoid(s+ - s- - margin) + center_coef (s+ + s-)^2
  mean over prompts of the mean over its pairs of -log sigmoid(s_better - s_worse)

Programs store partial sums, which a last program adds up in a fixed order.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on, side_by_side
from ppo_kernels.triton.common import (
    exp,
    furthest,
    load,
    log1p,
    number,
    places,
    read,
    total,
    write,
)  # fmt: skip
from ppo_kernels.triton.launch import OPTIONS, SIZES, TOKENS, processors, row

LANES, EACH, WARPS = 256, 4, 8  # of a tile of pairs
PROGRAMS = 4  # for each multiprocessor, at most
SUMS = 1024  # partial sums that are added up at a time
COLUMNS, RANKING_COLUMNS = 3, 4  # for each program
RANKED = 1024  # responses at a time, of as many prompts as have so many
RANKING_PROGRAMS = 16  # for each multiprocessor, at most
COUNTERS = 256  # programs that count, at most


@triton.jit
def _log_sigmoid(x):
    """(-log sigmoid(x), sigmoid(-x)), accurate where they are small."""
    far = tl.abs(x) > furthest(x)
    e = tl.where(far, 0.0, exp(tl.where(far, 0.0, -tl.abs(x))))
    if x.dtype == tl.float32:
        share = tl.div_rn(1.0 + e * 0.0, 1.0 + e)  # plain division is not exact
    else:
        share = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, -x, 0.0) + log1p(e), tl.where(x < 0.0, share, e * share)


@triton.jit(do_not_specialize=SIZES)  # but on alignment: scores in one piece are read wide
def pairs(
    chosen, rejected, margins, grad_chosen, grad_rejected, partials, count: tl.int64,
    margin: tl.float64, center_coef: tl.float64, ALIGNED: tl.constexpr, LANES: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """A grid-stride loop over tiles of pairs."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    SIZE: tl.constexpr = LANES * EACH
    center, margin = number(center_coef, DTYPE), number(margin, DTYPE)
    share = (1.0 / number(count, tl.float64)).to(DTYPE)
    zeros = tl.zeros((LANES,), DTYPE)
    losses, wins, differences = zeros, zeros, zeros
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    whole = count // SIZE
    for part in tl.static_range(2):  # whole tiles, and then what remains, the first program's
        ends = tl.cdiv(count, SIZE) if part else whole
        for tile in tl.range(
            whole + program if part else program, ends, programs, num_stages=1 if part else 3
        ):
            i = tile * SIZE + places(LANES, EACH, ALIGNED)
            inside = i < count
            s_chosen = read(chosen, i, inside, part == 0).to(DTYPE)
            s_rejected = read(rejected, i, inside, part == 0).to(DTYPE)
            difference, both = s_chosen - s_rejected, s_chosen + s_rejected
            ahead = difference - margin
            if margins is not None:
                ahead -= read(margins, i, inside, part == 0).to(DTYPE)
            loss, slope = _log_sigmoid(ahead)
            loss += center * both * both
            if grad_chosen is not None:
                slope_chosen = (2.0 * center * both - slope) * share
                write(grad_chosen, i, slope_chosen, inside, part == 0)
            if grad_rejected is not None:
                slope_rejected = (2.0 * center * both + slope) * share
                write(grad_rejected, i, slope_rejected, inside, part == 0)
            won = (difference > 0.0).to(DTYPE) + (difference == 0.0).to(DTYPE) * 0.5
            losses += tl.sum(tl.where(inside, loss, 0.0), 1)
            wins += tl.sum(tl.where(inside, won, 0.0), 1)
            differences += tl.sum(difference, 1)
    partials += program
    tl.store(partials, tl.sum(losses))
    tl.store(partials + programs, tl.sum(wins))
    tl.store(partials + 2 * programs, tl.sum(differences))


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
    """Fill the last four arguments, contiguous."""
    count = len(chosen)
    margins = None if margins is None else margins.contiguous()
    given = (chosen.contiguous(), rejected.contiguous(), margins)
    aligned = all(x is None or x.data_ptr() % 16 == 0 for x in given)
    each = EACH if aligned else 1  # with more, some registers would be spilled
    programs = min(triton.cdiv(count, LANES * each), PROGRAMS * processors(loss.device))
    partials = loss.new_empty(COLUMNS, programs)
    with on(loss.device):
        if programs:
            pairs[(programs,)](
                *given, grad_chosen, grad_rejected, partials, count, margin, center_coef, aligned,
                LANES, each, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
        totals[(1,)](partials, loss, stats, programs, count, SUMS, **OPTIONS)


# --- Rankings -------------------------------------------------------------------------------------


@triton.jit
def _ranks(ranks, first, prompts, candidates, ranks_row, PROMPTS: tl.constexpr, SIZE: tl.constexpr):
    """The ranks of some prompts' responses; -1 is absent."""
    prompt, j = first + tl.arange(0, PROMPTS), tl.arange(0, SIZE)
    there = (prompt < prompts)[:, None] & (j < candidates)[None, :]
    at = prompt[:, None] * ranks_row + j[None, :]
    return tl.load(ranks + at, mask=there, other=-1).to(tl.int64)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def count_ranked(
    ranks, counts, prompts: tl.int64, candidates: tl.int64, ranks_row: tl.int64,
    PROMPTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Partial counts of the prompts that have a pair."""
    found = tl.zeros((PROMPTS,), tl.int32)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for first in range(program * PROMPTS, prompts, programs * PROMPTS):
        r = _ranks(ranks, first, prompts, candidates, ranks_row, PROMPTS, SIZE)
        lowest = tl.min(tl.where(r >= 0, r, 2**62), 1)
        found += tl.max((r > lowest[:, None]).to(tl.int32), 1)
    tl.store(counts + program, tl.sum(found))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def rankings(
    scores, ranks, counts, grad_scores, partials, prompts: tl.int64, candidates: tl.int64,
    counters: tl.int64, scores_row: tl.int64, ranks_row: tl.int64, PROMPTS: tl.constexpr,
    SIZE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """Some prompts at a time: one response of each against all its others."""
    DTYPE: tl.constexpr = partials.dtype.element_ty
    p = tl.arange(0, COUNTERS)
    ranked = tl.sum(tl.load(counts + p, mask=p < counters, other=0)).to(tl.float64)
    lanes = tl.zeros((PROMPTS,), DTYPE)
    losses, pairs_of, wins, margins = lanes, lanes, lanes, lanes
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for first in range(program * PROMPTS, prompts, programs * PROMPTS):
        prompt, j = first + tl.arange(0, PROMPTS), tl.arange(0, SIZE)
        r = _ranks(ranks, first, prompts, candidates, ranks_row, PROMPTS, SIZE)
        s = load(scores, prompt[:, None] * scores_row + j[None, :], r >= 0, DTYPE)
        zeros = tl.zeros((PROMPTS, SIZE), DTYPE)
        loss_of, slopes, count_of, won, ahead_by = zeros, zeros, zeros, zeros, zeros
        for i in range(0, candidates):
            there = prompt < prompts
            rank = tl.load(ranks + prompt * ranks_row + i, mask=there, other=-1).to(tl.int64)
            own = load(scores, prompt * scores_row + i, there & (rank >= 0), DTYPE)[:, None]
            rank = rank[:, None]
            is_worse = (rank >= 0) & (r > rank)
            is_better = (r >= 0) & (rank > r)
            ahead = tl.where(is_worse, own - s, s - own)
            loss, slope = _log_sigmoid(ahead)
            slopes += tl.where(is_worse, slope, tl.where(is_better, -slope, 0.0))
            # Each pair once: where the other is the worse.
            loss_of += tl.where(is_worse, loss, 0.0)
            count_of += is_worse.to(DTYPE)
            won += tl.where(is_worse & (ahead > 0.0), 1.0, 0.0)
            won += tl.where(is_worse & (ahead == 0.0), 0.5, 0.0)
            ahead_by += tl.where(is_worse, ahead, 0.0)
        count = tl.sum(count_of, 1)
        each = tl.maximum(ranked, 1.0) * tl.maximum(count, 1.0).to(tl.float64)
        weight = (1.0 / each).to(DTYPE)
        if grad_scores is not None:
            inside = (prompt < prompts)[:, None] & (j < candidates)[None, :]
            at = prompt[:, None] * candidates + j[None, :]
            tl.store(grad_scores + at, slopes * weight[:, None], mask=inside)
        losses += tl.sum(loss_of, 1) * weight
        pairs_of += count
        wins += tl.sum(won, 1)
        margins += tl.sum(ahead_by, 1)
    partials += program
    tl.store(partials, tl.sum(losses))
    tl.store(partials + programs, tl.sum(pairs_of))
    tl.store(partials + 2 * programs, tl.sum(wins))
    tl.store(partials + 3 * programs, tl.sum(margins))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def ranking_totals(partials, loss, stats, programs: tl.int64, SIZE: tl.constexpr):
    """Loss, and `PairwiseStats` over all pairs."""
    tl.store(loss, total(partials, 0, programs, SIZE))
    count = tl.maximum(total(partials, 1, programs, SIZE), 1.0)
    tl.store(stats, total(partials, 2, programs, SIZE) / count)
    tl.store(stats + 1, total(partials, 3, programs, SIZE) / count)


def ranking_loss(
    scores: Tensor, ranks: Tensor, loss: Tensor, stats: Tensor, grad_scores: Tensor | None
) -> None:
    """Fill the last three arguments, contiguous."""
    given = side_by_side(scores), side_by_side(ranks)
    prompts, candidates = scores.shape
    rows = tuple(map(row, given))
    size = triton.next_power_of_2(max(candidates, 1))
    prompts_of = max(RANKED // size // (loss.element_size() // 4), 1)
    tiles = triton.cdiv(prompts, prompts_of)
    counters = min(tiles, COUNTERS)
    programs = min(tiles, RANKING_PROGRAMS * processors(loss.device))
    counts = torch.empty(max(counters, 1), dtype=torch.int32, device=loss.device)
    partials = loss.new_empty(RANKING_COLUMNS, programs)
    with on(loss.device):
        if prompts:
            count_ranked[(counters,)](
                given[1], counts, prompts, candidates, rows[1], prompts_of, size, **OPTIONS
            )
            rankings[(programs,)](
                *given, counts, grad_scores, partials, prompts, candidates, counters, *rows,
                prompts_of, size, COUNTERS, **OPTIONS,
            )  # fmt: skip
        ranking_totals[(1,)](partials, loss, stats, programs, SUMS, **OPTIONS)

"""How a loss iterates over its tokens: where they are, and by what their sum is divided.

A gradient needs the denominator of the mean, so where that is a number of tokens or of sequences,
these are counted first, from the mask alone.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.triton.common import is_real, number, places
from ppo_kernels.triton.launch import OPTIONS, SIZES, TOKENS, processors, row

LANES, EACH = 256, 4  # tokens at a time; where each has to be looked up, EACH is 1
PROGRAMS = 3  # for each multiprocessor, at most
TILE = 512  # tokens of a sequence at a time, where its real ones are counted
COUNTING_LANES = 256
COUNTERS = tl.constexpr(1024)  # programs that count, at most


@triton.jit
def token_places(i, T, cu_seqlens, sequences, steps, LOOKUP: tl.constexpr):
    """(sequence, position in its row) of the tokens i. A packed batch is one row; so are all rows
    of a padded one where nothing has to be looked up."""
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


@triton.jit
def token_at(b, t, row, LOOKUP: tl.constexpr):
    """The offset of a token; just `t` where all are in one piece, so that loads are wide."""
    if LOOKUP:
        return b * row + t
    else:
        return t


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def weigh(mask, cu_seqlens, row_weights, T: tl.int64, mask_row: tl.int64, SIZE: tl.constexpr):
    """One sequence per program: 1 over its number of real tokens, or 0."""
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


@triton.jit(do_not_specialize=SIZES)  # but on alignment: tokens in one piece are read wide
def count_partly(
    mask, row_weights, counts, count: tl.int64, T: tl.int64, mask_row: tl.int64,
    LOOKUP: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Partial counts of the real tokens, or (with `row_weights`) of sequences that have any."""
    found = tl.zeros((LANES,), tl.int32)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begins = program * LANES
    if ALIGNED:  # 16 tokens a lane, as 4 words of 4 bytes
        words = mask.to(tl.pointer_type(tl.int32), bitcast=True)
        halves = tl.zeros((LANES,), tl.int32)  # two counts, of 16 bits up to 2^34 tokens
        tiles = count // (16 * LANES)
        for tile in tl.range(program, tiles, programs, loop_unroll_factor=4):
            x = tl.load(words + tile * 4 * LANES + places(LANES, 4, True))
            x = x | (x >> 4)
            x = x | (x >> 2)
            x = (x | (x >> 1)) & 0x01010101  # of each byte, whether it is not 0
            halves += tl.sum((x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF), 1)
        found += (halves & 0xFFFF) + (halves >> 16)
        begins += tiles * 16 * LANES
    for start in range(begins, count, programs * LANES):
        i = start + tl.arange(0, LANES)
        if row_weights is None:
            b, t = token_places(i, T, None, 0, 0, LOOKUP)
            found += is_real(mask, token_at(b, t, mask_row, LOOKUP), i < count).to(tl.int32)
        else:
            found += (tl.load(row_weights + i, mask=i < count, other=0.0) > 0).to(tl.int32)
    tl.store(counts + program, tl.sum(found))


@triton.jit
def mean_weight(denominator, denominator_pointer, counts, counters):
    """1 over the denominator; in float64, as Triton's float32 division is not exact."""
    if counts is not None:
        p = tl.arange(0, COUNTERS)
        found = tl.sum(tl.load(counts + p, mask=p < counters, other=0).to(tl.int64)).to(tl.float64)
    elif denominator_pointer is not None:
        found = tl.load(denominator_pointer).to(tl.float64)
    else:
        found = number(denominator, tl.float64)
    return 1.0 / tl.where(found == 0.0, 1.0, found)


class Sweep:
    """How a loss iterates over its tokens, and its denominator; launches what counts that."""

    def __init__(
        self,
        tokens: tuple[Tensor | None, ...],
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        reduction: str,
        normalizer: float | Tensor | None,
        like: Tensor,
        of_sequences: bool = False,
    ) -> None:
        """`of_sequences`: each token's sequence is needed, whatever the reduction."""
        first = tokens[0]
        assert first is not None
        weighed = reduction == "sequence_mean"
        of_sequences = of_sequences or weighed
        count, length = first.numel(), first.shape[-1]
        sequences = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        in_one_piece = all(x is None or x.is_contiguous() for x in tokens)
        self.lookup = of_sequences or not in_one_piece
        # Tokens that can be read wide: of rows of any length, the first need not begin well.
        self.aligned = not self.lookup and all(x is None or x.data_ptr() % 16 == 0 for x in tokens)
        self.each = 1 if self.lookup else EACH
        tiles = triton.cdiv(count, LANES * self.each)
        self.programs = min(tiles, PROGRAMS * processors(like.device))
        self.denominator = 1.0
        row_weights = counts = pointer = None
        counters = 0
        if weighed:
            row_weights = like.new_empty(sequences)
            if sequences:
                weigh[(sequences,)](
                    mask, cu_seqlens, row_weights, length, row(mask), TILE, **OPTIONS
                )
        if isinstance(normalizer, Tensor):
            pointer = normalizer
        elif normalizer is not None:
            self.denominator = normalizer
        elif weighed or (reduction == "token_mean" and mask is not None):
            items = sequences if weighed else count
            counters = min(triton.cdiv(items, 16 * COUNTING_LANES), COUNTERS.value)
            counts = torch.empty(max(counters, 1), dtype=torch.int32, device=like.device)
            if counters:
                count_partly[(counters,)](
                    mask, row_weights, counts, items, length, row(mask), not in_one_piece,
                    self.aligned, COUNTING_LANES, num_warps=8, **OPTIONS,
                )  # fmt: skip
        elif reduction == "token_mean":
            self.denominator = float(count)
        steps = max(sequences, 1).bit_length()
        self.sequences = sequences
        self.pointers = (cu_seqlens if of_sequences else None, row_weights, counts, pointer)
        self.sizes = (count, length, sequences, steps, counters)

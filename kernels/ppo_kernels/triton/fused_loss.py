"""The backward pass of a loss whose gradients were computed in the forward pass."""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on
from ppo_kernels.triton.launch import OPTIONS, SIZES, TOKENS, processors

TILE = 4096
PROGRAMS = 2  # per multiprocessor, at most


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKENS)
def _scale(x, factor, count: tl.int64, SIZE: tl.constexpr):
    by = tl.load(factor)
    if by == 1.0:
        return
    first = tl.program_id(0).to(tl.int64) * SIZE
    for start in range(first, count, tl.num_programs(0).to(tl.int64) * SIZE):
        i = start + tl.arange(0, SIZE)
        tl.store(x + i, tl.load(x + i, mask=i < count) * by, mask=i < count)


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """`x`, contiguous, multiplied in place by a 0-dim tensor. A factor of 1 costs nothing, and the
    host need not know it."""
    if x.numel():
        programs = min(triton.cdiv(x.numel(), TILE), PROGRAMS * processors(x.device))
        with on(x.device):
            _scale[(programs,)](x, factor, x.numel(), TILE, num_warps=8, **OPTIONS)
    return x

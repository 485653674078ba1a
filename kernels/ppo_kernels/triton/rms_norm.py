"""`rms_norm`: y_j = x_j r (w_j + added) with r = 1 / sqrt(mean x^2 + eps), some rows per program.

Backward, for gradients g of y; r is made anew of x, which has to be read anyway:

  c    = mean g_j w_j x_j r
  dx_j = (g_j w_j - x_j r c) r
  dw_j = sum over the rows of g_j x_j r

Each program sums dw over its rows; a second kernel adds these parts in order. A row that fits the
registers is read once; a longer one in tiles, twice.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import accumulator, on
from ppo_kernels.triton.common import load, logit_row, number
from ppo_kernels.triton.launch import OPTIONS, SIZES, logit_rows, processors

# Bytes in the accumulation dtype: that a program takes at a time at the least, of several rows if
# they are short; that a thread takes; of a row that fits the registers.
TILE_BYTES, THREAD_BYTES = 8192, 64
FORWARD_BYTES, BACKWARD_BYTES = 65536, 32768
PROGRAMS = 16  # warps of backward programs for each multiprocessor
PARTS, COLUMNS = 32, 64  # of the weight's gradient that are added up at a time


@triton.jit
def _inverse_root(mean_square, there, eps):
    """1 / sqrt(mean + eps); of absent rows 1, as 0 times infinity would get into sums."""
    return tl.where(there, tl.rsqrt(mean_square + eps), 1.0)


@triton.jit(do_not_specialize=SIZES)
def normalize(
    x, weight, y, eps: tl.float64, added: tl.float64, width, inner: tl.int64,
    outer_stride: tl.int64, inner_stride: tl.int64, count: tl.int64, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LOOPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`y` is contiguous, `[count, width]`."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, j = i < count, tl.arange(0, COLUMNS)
    x += logit_row(i, inner, outer_stride, inner_stride)[:, None]
    y += (i * width)[:, None]
    eps, added = number(eps, DTYPE), number(added, DTYPE)
    if LOOPED:
        squares = tl.zeros((ROWS, COLUMNS), DTYPE)
        for start in range(0, width, COLUMNS):
            inside = there[:, None] & (start + j < width)[None, :]
            v = load(x, start + j[None, :], inside, DTYPE)
            squares += v * v
        r = _inverse_root(tl.sum(squares, 1) / width, there, eps)[:, None]
        for start in range(0, width, COLUMNS):
            inside = there[:, None] & (start + j < width)[None, :]
            v = load(x, start + j[None, :], inside, DTYPE)
            w = load(weight, start + j, start + j < width, DTYPE) + added
            tl.store(y + start + j[None, :], (v * r * w).to(y.dtype.element_ty), mask=inside)
    else:
        inside = there[:, None] & (j < width)[None, :]
        v = load(x, j[None, :], inside, DTYPE)
        r = _inverse_root(tl.sum(v * v, 1) / width, there, eps)[:, None]
        w = load(weight, j, j < width, DTYPE) + added
        tl.store(y + j[None, :], (v * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(v, g, w, r, c):
    return (g * w - v * r * c) * r


@triton.jit(do_not_specialize=[*SIZES, "grad_inner"])
def normalize_backward(
    grad_y, x, weight, grad_x, parts, eps: tl.float64, added: tl.float64, width, inner: tl.int64,
    outer_stride: tl.int64, inner_stride: tl.int64, grad_inner: tl.int64,
    grad_outer_stride: tl.int64, grad_inner_stride: tl.int64, count: tl.int64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOOPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`grad_x` is contiguous, `[count, width]`; `parts` is `[programs, width]`, zeros if LOOPED."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    j = tl.arange(0, COLUMNS)
    eps, added = number(eps, DTYPE), number(added, DTYPE)
    w = load(weight, j, j < width, DTYPE) + added
    sums = tl.zeros((ROWS, COLUMNS), DTYPE)
    if parts is not None:
        parts += program * width
    for first in range(program * ROWS, count, programs * ROWS):
        i = first + tl.arange(0, ROWS)
        there = i < count
        of_x = x + logit_row(i, inner, outer_stride, inner_stride)[:, None]
        of_y = grad_y + logit_row(i, grad_inner, grad_outer_stride, grad_inner_stride)[:, None]
        if LOOPED:
            squares, dots = tl.zeros((ROWS, COLUMNS), DTYPE), tl.zeros((ROWS, COLUMNS), DTYPE)
            for start in range(0, width, COLUMNS):
                inside = there[:, None] & (start + j < width)[None, :]
                v = load(of_x, start + j[None, :], inside, DTYPE)
                g = load(of_y, start + j[None, :], inside, DTYPE)
                w = load(weight, start + j, start + j < width, DTYPE) + added
                squares += v * v
                dots += g * w * v
            r = _inverse_root(tl.sum(squares, 1) / width, there, eps)
            c = (tl.sum(dots, 1) / width * r)[:, None]
            r = r[:, None]
            for start in range(0, width, COLUMNS):
                inside = there[:, None] & (start + j < width)[None, :]
                v = load(of_x, start + j[None, :], inside, DTYPE)
                g = load(of_y, start + j[None, :], inside, DTYPE)
                w = load(weight, start + j, start + j < width, DTYPE) + added
                if grad_x is not None:
                    dx = _gradient(v, g, w, r, c).to(grad_x.dtype.element_ty)
                    tl.store(grad_x + (i * width)[:, None] + start + j[None, :], dx, mask=inside)
                if parts is not None:
                    so_far = load(parts, start + j, start + j < width, DTYPE)
                    more = tl.sum(g * (v * r), 0)
                    tl.store(parts + start + j, so_far + more, mask=start + j < width)
            # Of the next row, other threads may read what these have written.
            tl.debug_barrier()
        else:
            inside = there[:, None] & (j < width)[None, :]
            v = load(of_x, j[None, :], inside, DTYPE)
            g = load(of_y, j[None, :], inside, DTYPE)
            r = _inverse_root(tl.sum(v * v, 1) / width, there, eps)
            if grad_x is not None:
                c = (tl.sum(g * w * v, 1) / width * r)[:, None]
                dx = _gradient(v, g, w, r[:, None], c).to(grad_x.dtype.element_ty)
                tl.store(grad_x + (i * width)[:, None] + j[None, :], dx, mask=inside)
            if parts is not None:
                sums += g * (v * r[:, None])
    if parts is not None:  # noqa: SIM102 - decided at compile time
        if not LOOPED:
            tl.store(parts + j, tl.sum(sums, 0), mask=j < width)


@triton.jit(do_not_specialize=SIZES)
def add_weight_parts(
    parts, grad_weight, width, programs: tl.int64, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sums over the programs, in order."""
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((PARTS, COLUMNS), parts.dtype.element_ty)
    for first in range(0, programs, PARTS):
        p = first + tl.arange(0, PARTS)
        inside = (p < programs)[:, None] & (j < width)[None, :]
        sums += tl.load(parts + p[:, None] * width + j[None, :], mask=inside, other=0.0)
    tl.store(grad_weight + j, tl.sum(sums, 0).to(grad_weight.dtype.element_ty), mask=j < width)


def _tiling(
    width: int, most_bytes: int, dtype: torch.dtype
) -> tuple[tuple[int, int, bool, tl.dtype], int]:
    """((rows, columns, whether a row takes several tiles, dtype of sums), warps) of a tile."""
    computed = accumulator(dtype)
    whole, most = triton.next_power_of_2(width), most_bytes // computed.itemsize
    columns = min(whole, most)
    rows = max(TILE_BYTES // (columns * computed.itemsize), 1)
    warps = min(max(rows * columns * computed.itemsize // (32 * THREAD_BYTES), 1), 16)
    sums = tl.float64 if computed == torch.float64 else tl.float32
    return (rows, columns, whole > most, sums), warps


def rms_norm(x: Tensor, weight: Tensor, eps: float, added: float, y: Tensor) -> None:
    """Fill `y`, contiguous, from x, float64 where that is computed in, with contiguous rows."""
    if not y.numel():
        return
    width = y.shape[-1]
    count = y.numel() // width
    x, *rows = logit_rows(x)
    tiling, warps = _tiling(width, FORWARD_BYTES, x.dtype)
    with on(y.device):
        normalize[(triton.cdiv(count, tiling[0]),)](
            x, weight, y, eps, added, width, *rows, count, *tiling, num_warps=warps,
            **OPTIONS,
        )  # fmt: skip


def rms_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    added: float,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Fill `grad_x` and `grad_weight`, contiguous, where they are not None."""
    width = x.shape[-1]
    if not x.numel():
        if grad_weight is not None:
            grad_weight.zero_()
        return
    count = x.numel() // width
    (x, *rows), (grad_y, *grad_rows) = logit_rows(x), logit_rows(grad_y)
    tiling, warps = _tiling(width, BACKWARD_BYTES, x.dtype)
    programs = min(triton.cdiv(count, tiling[0]), PROGRAMS // warps * processors(x.device))
    parts = None
    if grad_weight is not None:
        make = torch.zeros if tiling[2] else torch.empty
        parts = make((programs, width), dtype=accumulator(x.dtype), device=x.device)
    with on(x.device):
        normalize_backward[(programs,)](
            grad_y, x, weight, grad_x, parts, eps, added, width, *rows, *grad_rows, count, *tiling,
            num_warps=warps, **OPTIONS,
        )  # fmt: skip
        if grad_weight is not None:
            add_weight_parts[(triton.cdiv(width, COLUMNS),)](
                parts, grad_weight, width, programs, PARTS, COLUMNS, **OPTIONS
            )  # fmt: skip

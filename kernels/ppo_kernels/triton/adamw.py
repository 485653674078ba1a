"""`adamw`: one launch for all tensors, a program for each tile of one.

Where the tensors lie is a table in memory, as there may be hundreds. It is made on the host, and
kept for when the addresses are the same again, as they often are from step to step.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on
from ppo_kernels.reference.optimizer import _ONE, _SHIFT, MOMENT_BLOCK
from ppo_kernels.triton.common import number, read, write

TILE = 1024  # elements of a program, whole blocks of moments in 8 bits
BLOCK = tl.constexpr(MOMENT_BLOCK)
ONE = tl.constexpr(_ONE)
SHIFT = tl.constexpr(_SHIFT)
EACH = 4  # adjacent ones of a thread: 16 bytes of float32
SEARCHED = 1024  # tensors, at most, that are searched at a time

# Bits are to be those of every other implementation: nothing is fused but where `tl.fma` says so.
UNFUSED = {"enable_fp_fusion": False}

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(table, row, tensors, i, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """What row `row` of the table has of tensor i, as a pointer."""
    pointer = tl.load(table + row * tensors + i).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _number(given, pointer, place):
    """A number of float32: `given`, or what is in memory where there is a pointer."""
    if pointer is None:
        return number(given, tl.float32)
    else:
        return tl.load(pointer + place).to(tl.float32)


@triton.jit
def _dequantized(codes, scales, MOST: tl.constexpr):
    x = codes.to(tl.float32) * (1 / MOST)
    bits = tl.maximum(tl.abs(x).to(tl.int32, bitcast=True), SHIFT) - SHIFT
    part = (bits << 2).to(tl.float32, bitcast=True)
    return tl.where(x < 0, -part, part) * scales[:, None, None]


@triton.jit
def _scales(x):
    """Of each block, from its magnitudes; as bits these are in their order, with NaN above all."""
    most = tl.max(tl.max(tl.abs(x).to(tl.int32, bitcast=True), 2), 1).to(tl.float32, bitcast=True)
    return tl.where(most <= 2.0**126, most, float("nan"))


@triton.jit
def _quantized(x, scales, MOST: tl.constexpr):
    """The codes of magnitudes, int32."""
    normal = scales >= 2.0**-126
    inverse = tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), tl.where(normal, scales, 1.0))
    x = tl.abs(x) * tl.where(normal, inverse, 0.0)[:, None, None]
    bits = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, ONE)
    part = ((bits >> 2) + SHIFT).to(tl.float32, bitcast=True)
    # Adding to 2^23 rounds to the nearest, of two to the even one.
    return (part * MOST + 8388608.0).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _step(
    weights, grads, exp_avg, exp_avg_sq, remainder, scales, blocks, at, inside, decay, size, root,
    scale, mix, beta2, rest, eps, NEAR_MEAN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The formula, and its roundings, of `reference.adamw`."""
    w = read(weights, at, inside, WHOLE)
    if remainder is not None:  # as in `split_master`
        high = w.to(tl.int16, bitcast=True).to(tl.int32)
        low = read(remainder, at, inside, WHOLE).to(tl.int32)
        w = ((high << 16) + low).to(tl.float32, bitcast=True)
    g = read(grads, at, inside, WHOLE).to(tl.float32) * scale
    mean = read(exp_avg, at, inside, WHOLE)
    square = read(exp_avg_sq, at, inside, WHOLE)
    if scales is not None:
        block = tl.min(tl.min(at, 2), 1) // BLOCK
        mean = _dequantized(mean, tl.load(scales + block, mask=block < blocks, other=0), 127)
        of_roots = tl.load(scales + blocks + block, mask=block < blocks, other=0)
        square = _dequantized(square, of_roots, 255)
        square *= square
    mean = tl.fma(tl.zeros_like(g) + mix, g - mean, mean if NEAR_MEAN else g)
    square = tl.fma(rest * g, g, beta2 * square)
    deviation = tl.sqrt_rn(square)
    w = decay * w + tl.div_rn(size * mean, tl.div_rn(deviation, tl.zeros_like(g) + root) + eps)
    if scales is None:
        write(exp_avg, at, mean, inside, WHOLE)
        write(exp_avg_sq, at, square, inside, WHOLE)
    else:
        of_means, of_roots = _scales(mean), _scales(deviation)
        tl.store(scales + block, of_means, mask=block < blocks)
        tl.store(scales + blocks + block, of_roots, mask=block < blocks)
        codes = _quantized(mean, of_means, 127)
        codes = tl.where(mean < 0, -codes, codes)
        write(exp_avg, at, codes.to(tl.int8), inside, WHOLE)
        codes = _quantized(deviation, of_roots, 255)
        codes = tl.where((deviation > 0) & (codes == 0), 1, codes)
        write(exp_avg_sq, at, codes.to(tl.uint8), inside, WHOLE)
    if remainder is None:
        write(weights, at, w, inside, WHOLE)
    else:
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        low = tl.where(w == w, bits - (high << 16), 0).to(tl.int16)
        high = tl.where(w == w, high, 0x7FC0).to(tl.int16)
        write(weights, at, high.to(tl.bfloat16, bitcast=True), inside, WHOLE)
        write(remainder, at, low, inside, WHOLE)


@triton.jit(do_not_specialize=["tensors"])
def update(
    table, factors, grad_scale, tensors: tl.int32, decay: tl.float32, size: tl.float32,
    root: tl.float32, scale: tl.float32, mix: tl.float32, beta2: tl.float32, rest: tl.float32,
    eps: tl.float32, WEIGHT: tl.constexpr, GRAD: tl.constexpr, HALVES: tl.constexpr,
    EIGHT_BITS: tl.constexpr, NEAR_MEAN: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
    EACH: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """`table` `[8, tensors]`: the addresses, in the order of the public op, the number of elements,
    and the number of the first tile. `factors` `[3]` (decay, size, root) and `grad_scale`, 0-dim,
    take the place of the numbers where they are given."""
    tile = tl.program_id(0).to(tl.int64)
    i = tl.full((), -1, tl.int32)  # the last tensor that begins at this tile or before
    for first in range(0, tensors, SEARCHED):
        j = first + tl.arange(0, SEARCHED)
        begins = tl.load(table + 7 * tensors + j, mask=j < tensors, other=2**62)
        i += tl.sum((begins <= tile).to(tl.int32))
    weights = _pointer(table, 0, tensors, i, WEIGHT, ALIGNED)
    grads = _pointer(table, 1, tensors, i, GRAD, ALIGNED)
    exp_avg = _pointer(table, 2, tensors, i, tl.int8 if EIGHT_BITS else tl.float32, ALIGNED)
    exp_avg_sq = _pointer(table, 3, tensors, i, tl.uint8 if EIGHT_BITS else tl.float32, ALIGNED)
    remainder = _pointer(table, 4, tensors, i, tl.int16, ALIGNED) if HALVES else None
    scales = _pointer(table, 5, tensors, i, tl.float32, ALIGNED) if EIGHT_BITS else None
    count = tl.load(table + 6 * tensors + i)
    begin = (tile - tl.load(table + 7 * tensors + i)) * (LANES * EACH)
    decay, size = _number(decay, factors, 0), _number(size, factors, 1)
    root, scale = _number(root, factors, 2), _number(scale, grad_scale, 0)
    mix, beta2 = number(mix, tl.float32), number(beta2, tl.float32)
    rest, eps = number(rest, tl.float32), number(eps, tl.float32)
    if EIGHT_BITS:  # [blocks, a block's lanes, EACH]
        BLOCK_LANES: tl.constexpr = BLOCK // EACH
        lanes = tl.arange(0, LANES // BLOCK_LANES)[:, None] * BLOCK_LANES
        lanes = (lanes + tl.arange(0, BLOCK_LANES)[None, :])[:, :, None]
        at = begin + lanes * EACH + tl.arange(0, EACH)[None, None, :]
    else:
        at = begin + tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    blocks = (count + BLOCK - 1) // BLOCK
    if begin + LANES * EACH <= count:
        _step(
            weights, grads, exp_avg, exp_avg_sq, remainder, scales, blocks, at, at < count, decay,
            size, root, scale, mix, beta2, rest, eps, NEAR_MEAN, True,
        )  # fmt: skip
    else:
        _step(
            weights, grads, exp_avg, exp_avg_sq, remainder, scales, blocks, at, at < count, decay,
            size, root, scale, mix, beta2, rest, eps, NEAR_MEAN, False,
        )  # fmt: skip


def adamw(
    lists: Sequence[list[Tensor]], factors: tuple[Any, Any, Any],
    mixing: tuple[float, bool, float, float], eps: float, grad_scale: Any,
) -> None:  # fmt: skip
    """A step over the lists of `ppo_kernels.adamw`, all contiguous; its numbers likewise."""
    weights, grads, _, _, remainder, scales = lists
    device = weights[0].device
    none = (0,) * len(weights)
    addresses = tuple(tuple(x.data_ptr() for x in tensors) or none for tensors in lists)
    counts = tuple(x.numel() for x in weights)
    *begins, tiles = itertools.accumulate((triton.cdiv(n, TILE) for n in counts), initial=0)
    if not tiles:
        return
    in_memory = scale_in_memory = None
    if any(isinstance(x, Tensor) for x in factors):
        in_memory = torch.stack([_tensor(x, device) for x in factors]).float()
        factors = (0.0, 0.0, 0.0)
    if isinstance(grad_scale, Tensor):
        grad_scale, scale_in_memory = 0.0, grad_scale
    mix, near_mean, beta2, rest = mixing
    with on(device):
        update[(tiles,)](
            _table((*addresses, counts, tuple(begins)), device), in_memory, scale_in_memory,
            len(weights), *factors, grad_scale, mix, beta2, rest, eps, _TYPES[weights[0].dtype],
            _TYPES[grads[0].dtype], bool(remainder), bool(scales), near_mean,
            all(x % 16 == 0 for row in addresses for x in row), TILE // EACH, EACH,
            min(triton.next_power_of_2(len(weights)), SEARCHED), num_warps=4, **UNFUSED,
        )  # fmt: skip


def _tensor(x: Any, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x
    return torch.full((), x, dtype=torch.float64, device=device)


_Rows = tuple[tuple[int, ...], ...]
_MOST_KEPT = 4096  # tensors in all tables
# By what they hold, where that is, and the stream; the last one used is last.
_kept: dict[tuple[_Rows, torch.device, int], Tensor] = {}
_held = 0  # tensors in them
_captured: list[Tensor] = []  # a graph knows their addresses alone: never freed


def _table(rows: _Rows, device: torch.device) -> Tensor:
    """The table of `update`, in the device's memory, made without waiting for it.

    Each stream has tables of its own: it alone is sure to come after the copy. A capture, which
    begins when all work is done, takes any.
    """
    global _held
    if device.type != "cuda":
        return torch.tensor(rows)
    if torch.cuda.is_current_stream_capturing():
        for (of, where, _), found in _kept.items():
            if of == rows and where == device:
                _captured.append(found)
                return found
        raise RuntimeError(
            "adamw: call it once on the same tensors before a CUDA graph of it is captured; "
            "gradients must be contiguous there, as a copy is another tensor"
        )
    key = rows, device, torch.cuda.current_stream(device).cuda_stream
    if key in _kept:
        found = _kept.pop(key)
    else:
        found = torch.tensor(rows, pin_memory=True).to(device, non_blocking=True)
        _held += len(rows[0])
        while _kept and _held > _MOST_KEPT:
            oldest = next(iter(_kept))
            _held -= len(oldest[0][0])
            del _kept[oldest]
    _kept[key] = found
    return found

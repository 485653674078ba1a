"""`decode_attention`: one program for a row, its query heads that share a key/value head, and a
part of the keys; parts are merged in order by a second kernel.

In half precision the products are `tl.dot`s, the heads of the group padded to 16 rows, the weights
rounded to the values' dtype before they are summed too: what they average is still an average.
Otherwise they are products and sums in the accumulation dtype. Nothing on the host depends on the
lengths: a program whose part begins beyond them returns at once. A row's new key and value are
written by the program that reads them, whose part has the row's last place.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on
from ppo_kernels.triton.common import load, number, tanh
from ppo_kernels.triton.launch import OPTIONS, processors

_PROGRAMS = 4  # for each multiprocessor, which runs 2 to 4 at a time
_LEAST_KEYS = 128  # in a part: of fewer, what is merged would be as much as what is read
_TILE_BYTES = 16384  # of keys, or of values, that a program takes at a time
_TILE_PRODUCTS = 4096  # the same without `tl.dot`, where all products of a tile are held at once
_PARTS = 8  # that are merged at a time
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b):
    """a b in float32. Triton's interpreter takes bfloat16 for integers, so it gets it widened."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit
def _finite(m):
    """The maximum, 0 where there was nothing to take it of."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _average(weighted, m, total, sinks, head, inside):
    """Values that are weighted by e^{z - m}, of heads, by the sum of their weights and the sink's;
    0 where there was no key."""
    if sinks is not None:
        sink = load(sinks, head, inside, m.dtype)
        top = _finite(tl.maximum(m, sink))
        factor = tl.exp2((m - top) * LOG2_E)
        weighted = weighted * factor[:, None]
        total = total * factor + tl.exp2((sink - top) * LOG2_E)
    return weighted / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """As torch rounds: float64 to float32 first."""
    if dtype != tl.float64:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit(do_not_specialize=["window", "chunk"])
def attend(
    query, keys, values, lengths, sinks, new_keys, new_values, out, state, scale: tl.float64,
    cap: tl.float64, window, chunk, query_row, query_head, keys_row, keys_head, keys_step,
    values_row, values_head, values_step, new_keys_row, new_keys_head, new_values_row,
    new_values_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, SPLIT: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """With SPLIT, `out` are the weighted values of each part, [rows, heads, parts, VALUE_WIDTH],
    and `state` their maximum and their sum of weights, [2, rows, heads, parts]; else the result."""
    TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    row = (tl.program_id(0) // (KV_HEADS * TILES)).to(tl.int64)
    of_row = tl.program_id(0) % (KV_HEADS * TILES)
    kv_head = (of_row // TILES).to(tl.int64)
    of_group = of_row % TILES * HEADS + tl.arange(0, HEADS)
    inside = of_group < GROUP
    head = kv_head * GROUP + of_group

    length = tl.load(lengths + row)
    part = tl.program_id(1)
    begin = tl.maximum(length - window, 0) + part * chunk
    end = tl.minimum(begin + chunk, length)
    if SPLIT:  # noqa: SIM102 - decided at compile time
        if begin >= length:
            return

    d, e = tl.arange(0, COLUMNS), tl.arange(0, VALUE_COLUMNS)
    q = tl.load(
        query + row * query_row + head[:, None] * query_head + d[None, :],
        mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0,
    )  # fmt: skip
    keys += row * keys_row + kv_head * keys_head
    values += row * values_row + kv_head * values_head
    if new_keys is not None:
        # No program waits for another: those that read the last place, all heads of a group in
        # this part, write it each for itself, the same bits.
        last = (begin < length) & (end == length)
        new_keys += row * new_keys_row + kv_head * new_keys_head
        new_values += row * new_values_row + kv_head * new_values_head
        in_key, in_value = d < tl.where(last, WIDTH, 0), e < tl.where(last, VALUE_WIDTH, 0)
        key = tl.load(new_keys + d, mask=in_key, other=0.0)
        value = tl.load(new_values + e, mask=in_value, other=0.0)
        key, value = _rounded(key, keys.dtype.element_ty), _rounded(value, values.dtype.element_ty)
        tl.store(keys + (length - 1) * keys_step + d, key, mask=in_key)
        tl.store(values + (length - 1) * values_step + e, value, mask=in_value)
        tl.debug_barrier()  # what a thread has stored, the program's others read
    m = tl.full((HEADS,), float("-inf"), DTYPE)
    total = tl.zeros((HEADS,), DTYPE)
    weighted = tl.zeros((HEADS, VALUE_COLUMNS), DTYPE)
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        real = j < end
        k = tl.load(
            keys + j[:, None] * keys_step + d[None, :],
            mask=real[:, None] & (d < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        v = tl.load(
            values + j[:, None] * values_step + e[None, :],
            mask=real[:, None] & (e < VALUE_WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        if DOT:
            z = _dot(q, tl.trans(k))
        else:
            z = tl.sum(q.to(DTYPE)[:, None, :] * k.to(DTYPE)[None, :, :], 2)
        z *= number(scale, DTYPE)
        if CAPPED:
            z = tanh(z / number(cap, DTYPE)) * number(cap, DTYPE)
        z = tl.where(real[None, :], z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        m_safe = _finite(m_new)
        p = tl.exp2((z - m_safe[:, None]) * LOG2_E)
        factor = tl.exp2((m - m_safe) * LOG2_E)
        m = m_new
        weighted *= factor[:, None]
        if DOT:
            rounded = p.to(v.dtype)
            total = total * factor + tl.sum(rounded.to(DTYPE), 1)
            weighted += _dot(rounded, v)
        else:
            total = total * factor + tl.sum(p, 1)
            weighted += tl.sum(p[:, :, None] * v.to(DTYPE)[None, :, :], 1)

    place = row * KV_HEADS * GROUP + head
    if SPLIT:
        place = place * tl.num_programs(1) + part
        tl.store(state + place, m, mask=inside)
        parts = tl.num_programs(0).to(tl.int64) // TILES * GROUP * tl.num_programs(1)
        tl.store(state + parts + place, total, mask=inside)
    else:
        weighted = _average(weighted, m, total, sinks, head, inside)
    tl.store(
        out + place[:, None] * VALUE_WIDTH + e[None, :], weighted.to(out.dtype.element_ty),
        mask=inside[:, None] & (e < VALUE_WIDTH)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["window", "chunk", "parts"])
def merge_parts(
    weighted, state, lengths, sinks, out, window, chunk, parts, HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program for a head of a row: its parts in order, PARTS at a time."""
    DTYPE: tl.constexpr = weighted.dtype.element_ty
    place = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(lengths + place // HEADS), window)
    used = (count + chunk - 1) // chunk
    e = tl.arange(0, VALUE_COLUMNS)
    m = tl.full((1,), float("-inf"), DTYPE)
    total = tl.zeros((1,), DTYPE)
    merged = tl.zeros((1, VALUE_COLUMNS), DTYPE)
    for start in range(0, used, PARTS):
        part = start + tl.arange(0, PARTS)
        at = place * parts + part
        top = tl.load(state + at, mask=part < used, other=float("-inf"))
        sums = load(state + tl.num_programs(0).to(tl.int64) * parts, at, part < used, DTYPE)
        x = tl.load(
            weighted + at[:, None] * VALUE_WIDTH + e[None, :],
            mask=(part < used)[:, None] & (e < VALUE_WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(top, 0))
        m_safe = _finite(m_new)
        factor = tl.exp2((m - m_safe) * LOG2_E)
        each = tl.exp2((top - m_safe) * LOG2_E)
        m = m_new
        total = total * factor + tl.sum(sums * each, 0)
        merged = merged * factor[:, None] + tl.sum(x * each[:, None], 0)[None, :]
    head = place % HEADS + tl.arange(0, 1)
    merged = _average(merged, m, total, sinks, head, head < HEADS)
    tl.store(
        out + place * VALUE_WIDTH + e[None, :], merged.to(out.dtype.element_ty),
        mask=(e < VALUE_WIDTH)[None, :],
    )  # fmt: skip


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float | None,
    window: int,
    sinks: Tensor | None,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    out: Tensor,
    dtype: torch.dtype,
) -> None:
    """Fill `out`, contiguous; the others have a last stride of 1. `dtype` accumulates."""
    rows, heads, width = query.shape
    if not out.numel():
        return
    kv_heads, value_width = keys.shape[1], values.shape[-1]
    group = heads // kv_heads
    columns, value_columns = (max(triton.next_power_of_2(n), 16) for n in (width, value_width))
    widest = max(columns, value_columns)
    dot = query.dtype == keys.dtype and query.dtype in (torch.bfloat16, torch.float16)
    if dot:
        tile_heads = 16
        block = min(max(_TILE_BYTES // (widest * keys.element_size()), 16), 64)
    else:
        tile_heads = min(triton.next_power_of_2(group), 8)
        products = _TILE_PRODUCTS * 4 // dtype.itemsize
        block = min(max(products // (widest * tile_heads), 1), 64)
    programs = rows * kv_heads * triton.cdiv(group, tile_heads)
    wanted = triton.cdiv(_PROGRAMS * processors(query.device), programs)
    chunk = triton.cdiv(max(triton.cdiv(window, wanted), _LEAST_KEYS), block) * block
    parts = max(triton.cdiv(window, chunk), 1)

    new_strides: list[int | None] = [None] * 4
    if new_keys is not None and new_values is not None:
        new_strides = [*new_keys.stride()[:2], *new_values.stride()[:2]]
    weighted, state = out, None
    if parts > 1:
        weighted = torch.empty((rows, heads, parts, value_width), dtype=dtype, device=out.device)
        state = torch.empty((2, rows, heads, parts), dtype=dtype, device=out.device)
    with on(query.device):
        attend[(programs, parts)](
            query, keys, values, lengths, sinks, new_keys, new_values, weighted, state, scale,
            1.0 if softcap is None else softcap, window, chunk, *query.stride()[:2],
            *keys.stride()[:3], *values.stride()[:3], *new_strides, kv_heads, group, width,
            value_width, parts > 1, softcap is not None, dot, tile_heads, block, columns,
            value_columns, tl.float64 if dtype == torch.float64 else tl.float32,
            num_warps=8 if widest > 128 else 4, num_stages=3, **OPTIONS,
        )  # fmt: skip
        if parts > 1:
            merge_parts[(rows * heads,)](
                weighted, state, lengths, sinks, out, window, chunk, parts, heads, value_width,
                value_columns, _PARTS, num_warps=4, **OPTIONS,
            )  # fmt: skip

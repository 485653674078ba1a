"""`rotary_embedding`: one program for a token's query and key heads, or for those of several tokens
where heads are few; what they are rotated by is read once, and stays in registers.

Gradients are made by the same kernel, TRANSPOSED: with -sin of the second half in the place of the
first half's, and the other way round.
"""

# No `from __future__ import annotations`: triton reads the annotations of kernels.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.dispatch import on
from ppo_kernels.triton.common import load
from ppo_kernels.triton.launch import OPTIONS

_MOST_HEADS = 16  # at a time
_PAIRS = 1024  # of numbers, at a time
_BYTES = 16  # that a thread loads at once


@triton.jit
def _rotate_heads(
    x, out, of_tokens, of_out, of_tile, inside, cos_a, cos_b, sin_a, sin_b, c, d, head_stride,
    COUNT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """All heads of the tokens of a tile, HEADS at a time: each row of the tile is of one token and
    one of the HEADS. `of_tokens` and `of_out` are where the heads of a row's token begin."""
    WIDTH: tl.constexpr = 2 * HALF + REST
    OUT: tl.constexpr = out.dtype.element_ty
    for first in range(0, COUNT, HEADS):
        head = (first + of_tile).to(tl.int64)
        there = inside & (head < COUNT)
        source = x + (of_tokens + head * head_stride)[:, None]
        target = out + (of_out * COUNT + head)[:, None] * WIDTH
        if HALF > 0:
            pair = there[:, None] & (c < HALF)[None, :]
            a = load(source, c[None, :], pair, DTYPE)
            b = load(source, HALF + c[None, :], pair, DTYPE)
            tl.store(target + c[None, :], (a * cos_a - b * sin_a).to(OUT), mask=pair)
            tl.store(target + HALF + c[None, :], (b * cos_b + a * sin_b).to(OUT), mask=pair)
        if REST > 0:
            kept = there[:, None] & (d < REST)[None, :]
            rest = tl.load(source + 2 * HALF + d[None, :], mask=kept)
            tl.store(target + 2 * HALF + d[None, :], rest, mask=kept)


@triton.jit(do_not_specialize=["tokens", "count"])
def rotate(
    query, key, cos, sin, out_query, out_key, tokens, count, query_row, query_head, query_token,
    key_row, key_head, key_token, cos_row, cos_token, sin_row, sin_token,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    TRANSPOSED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`count` tokens in all, `tokens` in a row; outputs are contiguous, [count, heads, width]."""
    place = tl.arange(0, TOKENS * HEADS)
    i = tl.program_id(0).to(tl.int64) * TOKENS + place // HEADS
    inside = i < count
    row, token = i // tokens, i % tokens
    c, d = tl.arange(0, COLUMNS), tl.arange(0, REST_COLUMNS)
    cos += (row * cos_row + token * cos_token)[:, None]
    sin += (row * sin_row + token * sin_token)[:, None]
    pair = inside[:, None] & (c < HALF)[None, :]
    cos_a = load(cos, c[None, :], pair, DTYPE)
    cos_b = load(cos, HALF + c[None, :], pair, DTYPE)
    sin_a = load(sin, c[None, :], pair, DTYPE)
    sin_b = load(sin, HALF + c[None, :], pair, DTYPE)
    if TRANSPOSED:
        sin_a, sin_b = -sin_b, -sin_a
    of_tile = place % HEADS
    _rotate_heads(
        query, out_query, row * query_row + token * query_token, i, of_tile, inside, cos_a, cos_b,
        sin_a, sin_b, c, d, query_head, QUERY_HEADS, HALF, REST, HEADS, DTYPE,
    )  # fmt: skip
    _rotate_heads(
        key, out_key, row * key_row + token * key_token, i, of_tile, inside, cos_a, cos_b, sin_a,
        sin_b, c, d, key_head, KEY_HEADS, HALF, REST, HEADS, DTYPE,
    )  # fmt: skip


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    transposed: bool,
    out_query: Tensor,
    out_key: Tensor,
) -> None:
    """Fill the last two arguments, whose memory is [B, T, heads, D]; the others have a last stride
    of 1. Where cos and sin are float64, so are query and key."""
    rows, heads, tokens, width = query.shape
    kv_heads, half = key.shape[1], cos.shape[-1] // 2
    rest, count = width - 2 * half, rows * tokens
    if not count * width * (heads + kv_heads):
        return
    columns = triton.next_power_of_2(max(half, 1))
    rest_columns = triton.next_power_of_2(max(rest, 1))
    of_tile = min(triton.next_power_of_2(max(heads, kv_heads)), _MOST_HEADS)
    of_program = max(_PAIRS // (of_tile * max(columns, rest_columns)), 1)
    pairs = of_program * of_tile * columns
    warps = min(max(pairs * query.element_size() // (32 * _BYTES), 1), 8)
    dtype = tl.float64 if query.dtype == torch.float64 else tl.float32
    with on(query.device):
        rotate[(triton.cdiv(count, of_program),)](
            query, key, cos, sin, out_query, out_key, tokens, count, *query.stride()[:3],
            *key.stride()[:3], *_angle_strides(cos, rows), *_angle_strides(sin, rows), heads,
            kv_heads, half, rest, transposed, of_program, of_tile, columns, rest_columns, dtype,
            num_warps=warps, **OPTIONS,
        )  # fmt: skip


def _angle_strides(x: Tensor, rows: int) -> tuple[int, int]:
    """From row to row, and from token to token; of `[1, T, R]`, the one row is all rows'."""
    return x.stride(0) if x.shape[0] == rows else 0, x.stride(1)

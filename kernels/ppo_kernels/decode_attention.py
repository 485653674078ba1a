"""Attention of one new token per row over the keys and values of those before it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference

OP = "decode_attention"


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of one query per row and head over as many keys as its row has.

    Row b attends to the keys 0 to lengths[b] - 1; what lies beyond is not read, and may be NaN.
    Each key/value head serves as many query heads, adjacent ones, as there are times more of these.
    Nothing depends on the lengths but what is computed: a CUDA graph of a call is right for others.

    Args:
        query: `[B, Hq, D]`, any floating dtype. No gradient flows.
        keys, values: `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`, views of one dtype, which may be
            another than the query's. Hq is a multiple of Hkv. Read in place if the last dimension
            is contiguous, whatever the other strides; copied if not.
        lengths: `[B]` int64, 0 to S. A row of length 0 gives zeros.
        scale: what q·k is multiplied by.
        new_keys, new_values: `[B, Hkv, D]` and `[B, Hkv, Dv]`, any floating dtypes and strides:
            written to `keys[b, :, lengths[b] - 1]` and `values[b, :, lengths[b] - 1]`, in place and
            rounded to their dtype, before row b attends to them; a row of length 0 writes nothing.
            As flash-attn's `flash_attn_with_kvcache` does.
        softcap: positive; bounds the logits to ±softcap, by tanh, as Gemma-2's.
        window: 1 or more; only the last so many keys count.
        sinks: `[Hq]`, any floating dtype: for each head one more logit, whose value is 0.
        impl: "auto", or one of `implementations()["decode_attention"]`.

    Returns:
        `[B, Hq, Dv]` in the query's dtype. Computed in float32 (float64 where any input is); in
        half precision on a GPU, the softmax's weights are rounded to the values' dtype.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit; for keys or
            values that cannot be written in place; on the CPU, for a length not within 0 to S.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    _check(query, keys, values, lengths, sinks)
    if new_keys is not None or new_values is not None:
        _check_new(keys, values, new_keys, new_values)
    checks.number(OP, "scale", scale)
    if softcap is not None:
        checks.number(OP, "softcap", softcap, gt=0.0)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
        raise TypeError(f"{OP}: window must be an int, but is {window!r}")
    if window is not None:
        checks.number(OP, "window", window, ge=1, lt=2**63)
    impl = dispatch.resolve(OP, impl, query.device)
    if impl == "reference":
        check_lengths(lengths, keys.shape[2])
        with torch.no_grad():
            return reference.decode_attention(
                query, keys, values, lengths, scale=scale, new_keys=new_keys,
                new_values=new_values, softcap=softcap, window=window, sinks=sinks,
            )  # fmt: skip
    dispatch.refuse_recording(OP)
    out = query.new_empty((*query.shape[:2], values.shape[-1]))
    dtype = dispatch.accumulator(dispatch.common_dtype(query, keys, sinks))
    query, keys, values = map(dispatch.side_by_side, (query, keys, values))
    new_keys, new_values = dispatch.side_by_side(new_keys), dispatch.side_by_side(new_values)
    lengths = lengths.contiguous()
    sinks = None if sinks is None else sinks.to(dtype).contiguous()
    longest = keys.shape[2]
    window = longest if window is None else min(window, longest)
    if new_keys is not None:
        torch.autograd.graph.increment_version((keys, values))
    copied = impl == "cpp" and dtype is torch.float64 and keys.dtype is not dtype
    if new_keys is not None and new_values is not None and (copied or not out.numel()):
        check_lengths(lengths, longest)  # the kernels would write into copies, or not run at all
        with torch.no_grad():
            reference.write_last(keys, lengths, new_keys)
            reference.write_last(values, lengths, new_values)
        new_keys = new_values = None
    if impl == "cpp":
        if copied:
            keys, values = keys.to(dtype), values.to(dtype)
        wrong = dispatch.cpu.decode_attention(
            query, keys, values, lengths, scale, math.inf if softcap is None else softcap, window,
            sinks, new_keys, new_values, out, torch.get_num_threads(),
        )  # fmt: skip
        if wrong >= 0:
            raise _no_length(lengths, wrong, longest)
    else:
        check_lengths(lengths, longest)
        dispatch.triton_kernels("decode_attention").decode_attention(
            query, keys, values, lengths, scale, softcap, window, sinks, new_keys, new_values, out,
            dtype,
        )  # fmt: skip
    return out


def _check(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, sinks: Tensor | None
) -> None:
    """Types, shapes and devices."""
    checks.tensor(OP, "query", query)
    checks.tensor(OP, "keys", keys, like=("query", query))
    checks.tensor(OP, "values", values, (keys.dtype,), like=("query", query))
    checks.plain(OP, query=query, keys=keys, values=values, lengths=lengths, sinks=sinks)
    of_query, of_keys, of_values = query.shape, keys.shape, values.shape
    if (
        len(of_query) != 3
        or len(of_keys) != 4
        or of_values[:-1] != of_keys[:-1]
        or of_query[0] != of_keys[0]
        or of_query[2] != of_keys[3]
    ):
        raise ValueError(
            f"{OP}: query, keys and values must be [B, Hq, D], [B, Hkv, S, D] and [B, Hkv, S, Dv], "
            f"but are {tuple(of_query)}, {tuple(of_keys)} and {tuple(of_values)}"
        )
    heads, kv_heads = of_query[1], of_keys[1]
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{OP}: the query must have a multiple of the keys' {kv_heads} heads, but has {heads}"
        )
    like = ("query", query)
    checks.tensor(OP, "lengths", lengths, (torch.int64,), shape=(of_query[0],), like=like)
    if sinks is not None:
        checks.tensor(OP, "sinks", sinks, shape=(heads,), like=like)


def _check_new(
    keys: Tensor, values: Tensor, new_keys: Tensor | None, new_values: Tensor | None
) -> None:
    """Of those that fit otherwise."""
    if new_keys is None or new_values is None:
        raise ValueError(f"{OP}: new_keys and new_values are given together, or neither is")
    rows, heads, _, width = keys.shape
    like = ("keys", keys)
    checks.tensor(OP, "new_keys", new_keys, shape=(rows, heads, width), like=like)
    shape = (rows, heads, values.shape[3])
    checks.tensor(OP, "new_values", new_values, shape=shape, like=like)
    checks.plain(OP, new_keys=new_keys, new_values=new_values)
    for name, slots in (("keys", keys), ("values", values)):
        if not _writable(slots.shape, slots.stride()):
            raise ValueError(
                f"{OP}: {name} must have a contiguous last dimension and no memory twice where "
                f"new_{name} are written to them, but have strides {slots.stride()}"
            )


@functools.lru_cache
def _writable(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether each number has its own place in memory, those of the last dimension side by side."""
    reach = 1  # of the dimensions of smaller strides
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += max(size - 1, 0) * stride
    return strides[-1] == 1 or shape[-1] <= 1


def check_lengths(lengths: Tensor, longest: int) -> None:
    """Raise ValueError for the first that is longer; trusted where not on the CPU."""
    if lengths.device.type == "cpu":
        wrong = (lengths < 0) | (lengths > longest)
        if wrong.any():
            raise _no_length(lengths, int(wrong.int().argmax()), longest)


def _no_length(lengths: Tensor, at: int, longest: int) -> ValueError:
    return ValueError(
        f"{OP}: lengths[{at}] is {int(lengths[at])}, but must be within 0 to {longest}"
    )

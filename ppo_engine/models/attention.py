"""The attention of a model while it reads packed rows, behind transformers' interface.

Each text attends to itself alone: on a GPU by PyTorch's attention over texts of many lengths, else
(and for what that does not know: softcaps, sinks, float32) in buckets of texts about as long as
each other, with the tokens in between still packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ppo_engine.models.segments import Segments
from ppo_engine.models.windows import Unsupported

ATTENTION = "ppo_packed"  # the name under which transformers finds `_attend`
# Up to so many tokens a text, scores as a tensor of their own are faster on a CPU in bf16 than
# torch's fused kernel, whose products of small blocks take five times as long (bench/notes/cpu.md).
SHORT = 256
# torch 2.11 takes grouped heads without being told; later ones want to be.
_SAYS_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention, `[1, heads, T, size]`: `[1, T, heads, size]`, and no
    weights."""
    if segments is None or attention_mask is not None or position_bias is not None:
        raise Unsupported("its attention is not told where texts begin, or has more than that")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = segments.window(sliding_window)
    # [T, heads, size], as the layers' products have made them.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    plain = softcap is None and s_aux is None
    if plain and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _by_lengths(query, key, value, segments, scale, window)[None], None
    sizes = [bucket.tokens for bucket in segments.buckets]
    parts = zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
    found = [
        bucket.give(
            _in_rows(bucket.take(q), bucket.take(k), bucket.take(v), scale, window, softcap, s_aux)
        )
        for bucket, (q, k, v) in zip(segments.buckets, parts, strict=True)
    ]
    return (found[0] if len(found) == 1 else torch.cat(found))[None], None


def _by_lengths(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    grouped: Any = {"enable_gqa": query.shape[1] != key.shape[1]} if _SAYS_GROUPED else {}
    found: Any = varlen_attn(
        query, key, value, segments.cu_seqlens, segments.cu_seqlens, segments.longest,
        segments.longest, scale=scale, window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )  # fmt: skip
    return cast(Tensor, found)


def _in_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of rows `[rows, width, heads, size]`, each to itself."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    width, groups = query.shape[2], query.shape[1] // key.shape[1]
    short = query.dtype == torch.bfloat16 and query.device.type == "cpu" and width <= SHORT
    mask = None
    if window is not None:
        mask = _mask(width, window, query.device)
    if softcap is None and sinks is None and not short:
        found = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=groups > 1,
        )  # fmt: skip
        return found.transpose(1, 2)
    mask = _mask(width, window, query.device) if mask is None else mask
    # The query heads of a key head are rows of one product.
    rows, heads, _, size = query.shape
    together = query.reshape(rows, heads // groups, groups * width, size)
    products = (together @ key.transpose(2, 3)).view(rows, heads, width, width)
    if softcap is None and sinks is None:
        weights: Tensor = _Softmax.apply(products, mask, scale)
    else:
        weights = special_softmax(products, mask, scale, softcap, sinks)
    found = weights.reshape(rows, heads // groups, groups * width, width) @ value
    return found.view(rows, heads, width, -1).transpose(1, 2)


def special_softmax(
    products: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Weights `[rows, heads, …, tokens]` of masked and scaled `products`, in their dtype, with
    logits that are capped and heads `[heads]` that may attend to nothing."""
    z = products.float() * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        z = torch.cat((z, sinks.float()[None, :, None, None].expand(*z.shape[:-1], 1)), -1)
    return z.softmax(-1)[..., : products.shape[-1]].to(products.dtype)


class _Softmax(torch.autograd.Function):
    """Of masked and scaled products, in float32; kept as it is returned, in their dtype, in which
    the next product keeps it as well. A text at a time: what is made in between for all of them
    would leave holes between what the layers keep."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, mask: Tensor, scale: float) -> Tensor:
        weights = torch.empty_like(products)
        for x, found in zip(products, weights, strict=True):
            z = (x.float() * scale).masked_fill_(~mask, -torch.inf)
            found.copy_(z.softmax(-1))
        ctx.save_for_backward(weights)
        ctx.scale = scale
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        found = torch.empty_like(kept)
        for x, of_weights, weights in zip(found, grad, kept, strict=True):
            z = torch.ops.aten._softmax_backward_data(
                of_weights.float(), weights.float(), -1, torch.float32
            )
            x.copy_(z.mul_(ctx.scale))
        return found, None, None


def _mask(width: int, window: int | None, device: torch.device) -> Tensor:
    """`[width, width]`, True is what is attended to."""
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def using(config: Any, attention: str) -> Iterator[None]:
    """Inside, models with this configuration use the attention that transformers knows by this
    name."""
    of_text = config.get_text_config()
    before = of_text._attn_implementation
    of_text._attn_implementation = attention
    try:
        yield
    finally:
        of_text._attn_implementation = before

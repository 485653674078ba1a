"""Sums over sequences and positions in them, padded `[B, T]` or packed `[N]`."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_sums(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[B]` sums of a token tensor over each sequence."""
    if cu_seqlens is None:
        return x.sum(1)
    return x.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence_ids(cu_seqlens, len(x)), x)


def per_token(x_B: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each sequence's value at each of its tokens."""
    if cu_seqlens is None:
        return x_B[:, None].expand_as(like)
    return x_B[sequence_ids(cu_seqlens, len(like))]


def token_means(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """At each token, the mean over its sequence's real tokens of `x`, which is 0 elsewhere."""
    tokens = sequence_sums(mask.long(), cu_seqlens).clamp(min=1)
    return per_token(sequence_sums(x, cu_seqlens) / tokens, x, cu_seqlens)


def is_last_real(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """True at the last real token of each sequence: real, with no real one after it."""
    mask_BT = mask if cu_seqlens is None else padded(mask, cu_seqlens) & places_inside(cu_seqlens)
    last = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)
    return last if cu_seqlens is None else last[places_inside(cu_seqlens)]


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """`[N]`: the sequence that each of that many packed tokens belongs to."""
    lengths = cu_seqlens.long().diff()
    ids = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(ids, lengths, output_size=tokens)


def places_inside(cu_seqlens: Tensor) -> Tensor:
    """`[B, T]`: which positions of the padded layout hold a packed token."""
    lengths = cu_seqlens.long().diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def padded(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The packed `x_N` as `[B, T]`; positions outside a sequence are 0."""
    inside = places_inside(cu_seqlens)
    return x_N.new_zeros(inside.shape).masked_scatter(inside, x_N)

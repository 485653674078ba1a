"""The attention of a model while it reads and writes slots, behind transformers' interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ppo_engine.pretrained import architecture

ATTENTION = "ppo_slots"  # the name under which transformers finds `_attend`
UNCAPPED = "ppo_slots_uncapped"  # in place of "sdpa", which up to transformers 5.17 caps no logits


class Unsupported(Exception):
    """A model that cannot be run over slots, and why."""


@dataclass(frozen=True)
class Windows:
    """How far back the layers of a model look, by their kind."""

    sliding: int | None  # tokens
    kinds: tuple[str, ...]  # of layers, where there are several

    @classmethod
    def of(cls, config: Any) -> Windows:
        """As a model's configuration has it; raises `Unsupported` for other kinds of layers."""
        text = config.get_text_config()
        kinds = tuple(sorted(set(getattr(text, "layer_types", None) or ())))
        other = set(kinds) - {"full_attention", "sliding_attention"}
        if other:
            raise Unsupported(f"it has layers of the kind {min(other)!r}")
        sliding = getattr(text, "sliding_window", None)
        if getattr(text, "use_sliding_window", True) is False:
            sliding = None
        return cls(sliding, kinds)

    @property
    def only(self) -> str:
        """The kind of all layers, where the configuration does not tell them apart."""
        return self.kinds[0] if self.kinds else "sliding_attention"

    def width(self, kind: str) -> int | None:
        return self.sliding if kind == "sliding_attention" else None

    def masks(self, positions: Tensor, length: int) -> Any:
        """For queries at `positions` [rows, tokens] and `length` keys, True is what is attended
        to: `[rows, 1, tokens, length]`, by kind where there are several."""
        keys = torch.arange(length, device=positions.device)
        distance = positions[:, None, :, None] - keys
        causal = distance >= 0

        def mask(kind: str) -> Tensor:
            width = self.width(kind)
            return causal if width is None else causal & (distance < width)

        several = len(self.kinds) > 1
        return {kind: mask(kind) for kind in self.kinds} if several else mask(self.only)


class How(NamedTuple):
    """What a layer says of its attention."""

    mask: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_special(self) -> bool:
        """Whether torch's attention does not know it."""
        return self.softcap is not None or self.sinks is not None


# What attends to the slots that the running pass reads, by query, keys, values, and how. Takes
# `[rows, heads, tokens, size]`, and gives `[rows, tokens, heads, size]`.
CURRENT: ContextVar[Callable[[Tensor, Tensor, Tensor, How], Tensor]] = ContextVar("attention")


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
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: `[rows, tokens, heads, size]`, and no weights."""
    if attention_mask is None or position_bias is not None:
        raise Unsupported("its attention has more than a mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    how = How(attention_mask, scale, softcap, s_aux)
    return CURRENT.get()(query.to(key.dtype), key, value, how), None


def attend_masked(query: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
    """Attention `[rows, tokens, heads, size]` of `query` [rows, heads, tokens, size] to what its
    mask allows."""
    groups = query.shape[1] // keys.shape[1]
    # On a GPU, torch's fast kernels know masks or grouped heads, not both.
    grouped = groups > 1 and not (how.is_special or query.is_cuda)
    if not grouped:
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    if not how.is_special:
        found = scaled_dot_product_attention(
            query, keys, values, attn_mask=how.mask, scale=how.scale, enable_gqa=grouped
        )
        return found.transpose(1, 2).contiguous()
    z = (query @ keys.transpose(2, 3)).float() * how.scale
    if how.softcap is not None:
        z = how.softcap * torch.tanh(z / how.softcap)
    z = z.masked_fill(~how.mask, -torch.inf)
    if how.sinks is not None:
        sinks = how.sinks.float()[None, :, None, None].expand(*z.shape[:-1], 1)
        z = torch.cat((z, sinks), -1).softmax(-1)[..., :-1]
    else:
        z = z.softmax(-1)
    return (z.to(values.dtype) @ values).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, _attend)
AttentionInterface.register(
    UNCAPPED, lambda *given, **how: _attend(*given, **how | {"softcap": None})
)


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """Inside, the attention of `model` is that over slots."""
    config = architecture.unwrap(model).config
    of_text = config.get_text_config()
    before = of_text._attn_implementation
    of_text._attn_implementation = UNCAPPED if before == "sdpa" else ATTENTION
    try:
        yield
    finally:
        of_text._attn_implementation = before

"""The attention of a model while it reads and writes slots, behind transformers' interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ppo_engine.models.attention import special_softmax, using
from ppo_engine.models.windows import Unsupported
from ppo_engine.pretrained import architecture

ATTENTION = "ppo_slots"  # the name under which transformers finds `_attend`
UNCAPPED = "ppo_slots_uncapped"  # in place of "sdpa", which up to transformers 5.17 caps no logits


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
    products = query @ keys.transpose(2, 3)
    weights = special_softmax(products, how.mask, how.scale, how.softcap, how.sinks)
    return (weights @ values).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, _attend)
AttentionInterface.register(
    UNCAPPED, lambda *given, **how: _attend(*given, **how | {"softcap": None})
)


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """Inside, the attention of `model` is that over slots."""
    config = architecture.unwrap(model).config
    before = config.get_text_config()._attn_implementation
    with using(config, UNCAPPED if before == "sdpa" else ATTENTION):
        yield

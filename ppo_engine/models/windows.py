"""How far back the layers of a model look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Unsupported(Exception):
    """A model that cannot be run as others are, and why."""


def sliding_window(text: Any) -> int | None:
    """Tokens that the sliding layers see, by the configuration of a model's text."""
    if getattr(text, "use_sliding_window", True) is False:
        return None
    return getattr(text, "sliding_window", None)


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
        return cls(sliding_window(text), kinds)

    def count(self, config: Any) -> int:
        """The layers that look back so far and no further."""
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None) or [self.only] * text.num_hidden_layers
        return sum(self.width(kind) is not None for kind in kinds)

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

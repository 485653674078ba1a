"""Mixtures of experts: the loss that keeps their load balanced."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What the library's `load_balancing_loss_func` of nearly every family takes.
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class BalanceLoss:
    """The load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6), as
    transformers adds it to a language model's own loss, of the family's own function.

    Where it is not asked for it is 0. It is of each forward pass: the product of what the tokens
    choose and how probable that is has no sum over the passes of a mini-batch that would equal it.
    """

    function: Callable[..., Any] | None = None
    coefficient: float = 0.0
    experts: int = 0
    chosen: int = 0  # experts of each token
    note: str = ""

    @classmethod
    def of(cls, model: Any) -> BalanceLoss:
        """What the configuration of `model` asks for (`output_router_logits`)."""
        config = model.config.get_text_config()
        coefficient = getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", 0.0))
        if not getattr(config, "output_router_logits", False):
            return cls()
        function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if function is None or list(inspect.signature(function).parameters) != _ARGUMENTS:
            return cls(
                note=f"output_router_logits is set, but no balance loss is trained with: how "
                f"{type(model).__name__} computes it is not known here."
            )
        return cls(
            function,
            coefficient,
            model.num_experts,
            model.num_experts_per_tok,
            f"The experts' balance loss is part of the loss, weighted by {coefficient:g}, as the "
            "model's config.json asks for (output_router_logits).",
        )

    def __call__(self, router_logits: Any, mask: Tensor) -> Tensor | float:
        """The weighted loss, 0-dim, of the routers' logits, each layer's `[B * L, experts]`, at
        the real tokens of `mask` `[B, L]`."""
        if self.function is None:
            return 0.0
        found: Tensor = self.function(router_logits, self.experts, self.chosen, mask)
        return self.coefficient * found

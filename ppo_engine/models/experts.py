"""Mixtures of experts: the loss that keeps their load balanced."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppo_engine.errors import UserError

# What the library's `load_balancing_loss_func` of nearly every family takes.
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def asks_for_balance(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


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
        if not asks_for_balance(model):
            return cls()
        config = model.config.get_text_config()
        function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)

        def value(*names: str) -> Any:
            return next((getattr(x, n) for n in names for x in (model, config) if hasattr(x, n)), 0)

        coefficient = value("router_aux_loss_coef", "aux_loss_coef")
        experts, chosen = value("num_experts"), value("num_experts_per_tok")
        known = function and list(inspect.signature(function).parameters) == _ARGUMENTS
        if not (known and experts and chosen):
            return cls(
                note="output_router_logits is set in config.json, but training is without the "
                f"experts' balance loss: how {type(model).__name__} computes it is not known here."
            )
        return cls(
            function,
            coefficient,
            experts,
            chosen,
            f"The experts' balance loss, times {coefficient:g}, is part of the language model's "
            "loss, as its config.json asks for (output_router_logits).",
        )

    def __call__(self, router_logits: Any, mask: Tensor) -> Tensor | float:
        """The weighted loss, 0-dim, of the routers' logits, each layer's `[B * L, experts]`, at
        the real tokens of `mask` `[B, L]`."""
        if self.function is None:
            return 0.0
        if not router_logits:  # the library's function would return 0
            raise UserError(
                "The experts' balance loss cannot be computed: this version of transformers gives "
                "no router logits for the model. Upgrade it, or set output_router_logits to false "
                "in config.json."
            )
        found: Tensor = self.function(router_logits, self.experts, self.chosen, mask)
        return self.coefficient * found


def unrouted(model: Any) -> dict[str, bool]:
    """Arguments of `generate` for a model that would compute the balance loss of each step, for
    which a cache has too few tokens."""
    return {"output_router_logits": False} if asks_for_balance(model) else {}

"""The floating-point operations of a model's matrix products, from which MFU and the floors of the
benchmarks follow.

A product with a matrix takes 2 for each of its elements and token that it reads, 2 more for the
gradient of the matrix and 2 for that of what it reads, where these are made: a frozen matrix has
none of its own, and below the lowest that is trained there are none at all (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1; "model FLOPs" of Chowdhery et al. 2022, arXiv:2204.02311, appendix
B). Attention takes 2 for its scores and 2 for its sums, for each element of the heads and pair of
tokens that see each other, and twice that for the gradients. The output layer is counted where its
logits are wanted. What layers run again for their gradients (checkpointing) is not counted, nor is
padding; norms, softmax, a score head and the states of layers without attention are too little.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_engine.errors import UserError
from ppo_engine.models import probes
from ppo_engine.models.windows import sliding_window
from ppo_engine.pretrained import architecture

_WITHOUT_ATTENTION = ("linear_attention", "conv", "moe", "mlp", "mamba", "recurrent")
_TOKENS = 2  # of the text that shows which matrices a token meets


class Span(NamedTuple):
    """New tokens of a text, behind others that have been read."""

    before: int
    new: int


class Attention(NamedTuple):
    """Layers that look equally far back."""

    size: float  # heads times head dimension, of all of them
    trained: float = 0.0  # of that, with gradients
    window: int | None = None


@dataclass(frozen=True)
class Costs:
    """What the operations of a model follow from; counts of elements."""

    weights: float  # of the matrices that a token meets, without the output layer's
    attention: tuple[Attention, ...]
    head: float = 0.0  # of the output layer
    trained: float = 0.0  # of `weights`, those that have gradients
    passed: float = 0.0  # of `weights`, those through which gradients go to what they read
    head_trained: bool = False
    head_passed: bool = False

    @classmethod
    @torch.enable_grad()
    def of(cls, model: Any) -> Costs:
        """Of `model` as it is trained, adapters included: from a pass over a short text, on the
        meta device too."""
        model = architecture.unwrap(model)
        head, base = model.get_output_embeddings(), model.base_model
        ids = probes.probe_ids(model)[:, :_TOKENS]
        of_text = model.config.get_text_config()
        seen = _Seen(ids.numel(), _chosen(of_text))
        own_head = set() if head is None else set(head.modules())
        with ExitStack() as stack:
            for module in base.modules():
                if module not in own_head and _matrices(module):
                    hook = module.register_forward_pre_hook(seen.matrix, with_kwargs=True)
                    stack.callback(hook.remove)
            for layer in _layers(model):
                hook = layer.register_forward_pre_hook(seen.layer, with_kwargs=True)
                stack.callback(hook.remove)
            output = base(**architecture.base_inputs(base, ids, torch.ones_like(ids)))
        return cls(
            weights=seen.weights,
            attention=_attention(of_text, seen.layers),
            head=sum(_elements(module, None) for module in own_head),
            trained=seen.trained,
            passed=seen.passed,
            head_trained=head is not None and any(p.requires_grad for p in head.parameters()),
            head_passed=bool(output[0].requires_grad),
        )

    def flop(
        self,
        spans: Iterable[Span],
        states: int,
        *,
        gradients: bool = False,
        layers: float = 1.0,
    ) -> float:
        """Of a pass that reads the new tokens of these `spans`, with logits of so many `states`;
        with the products of the `gradients`, where some are to be made. `layers` is the share of
        them that is run, where what the lower ones give is known (`models.trunk`)."""
        spans = list(spans)
        tokens = sum(span.new for span in spans)
        found = 2 * self.weights * tokens * layers + 2 * self.head * states
        if gradients:
            found += 2 * (self.trained + self.passed) * tokens
            found += 2 * (self.head_trained + self.head_passed) * self.head * states
        for part in self.attention:
            pairs = sum(_pairs(span, part.window) for span in spans)
            found += (4 * part.size * layers + (8 * part.trained if gradients else 0)) * pairs
        return found


class _Seen:
    """What the modules of a model read, in one pass over so many tokens."""

    def __init__(self, tokens: int, chosen: float | None) -> None:
        self.tokens = tokens
        self.chosen = chosen  # experts of each token
        self.weights = self.trained = self.passed = 0.0
        self.layers: list[bool] = []  # of each, whether gradients go through its attention

    def matrix(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _read(args, kwargs)
        if x is None:
            return
        times = 1.0
        if not isinstance(module, nn.modules.conv._ConvNd):  # an expert reads its own tokens only
            times = x.numel() / x.shape[-1] / self.tokens
        elements = times * _elements(module, self.chosen)
        self.weights += elements
        self.trained += elements * any(p.requires_grad for p in _matrices(module))
        self.passed += elements * x.requires_grad

    def layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x, trained = _read(args, kwargs), any(p.requires_grad for p in module.parameters())
        self.layers.append(trained or (x is not None and x.requires_grad))


def _read(args: Any, kwargs: Any) -> Tensor | None:
    """The states that a module is called with; None where it looks something up."""
    given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    return next((x for x in given if x.is_floating_point()), None)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """A module's own, where it multiplies by them."""
    if isinstance(module, nn.Embedding):
        return []
    return [p for p in module.parameters(recurse=False) if p.ndim > 1]


def _chosen(config: Any) -> float | None:
    """Experts of each token, on average over the layers where these differ."""
    chosen = getattr(config, "num_experts_per_tok", None)
    return sum(chosen) / len(chosen) if isinstance(chosen, list) else chosen


def _elements(module: nn.Module, chosen: float | None) -> float:
    """Of the matrices by which a module multiplies each token; of experts, of the `chosen`."""
    if isinstance(module, nn.Linear):  # quantized, its weight has another shape
        return module.in_features * module.out_features
    found = 0.0
    for matrix in _matrices(module):
        of_experts = matrix.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
        share = chosen / len(matrix) if chosen and of_experts else 1.0
        found += share * matrix.numel()
    return found


def _layers(model: PreTrainedModel) -> Iterable[nn.Module]:
    try:
        return architecture.decoder_layers(model)
    except (UserError, AttributeError):  # a family that keeps them otherwise
        return []


def _attention(config: Any, passed: list[bool]) -> tuple[Attention, ...]:
    """Of the layers of a model with this configuration of its text; of each, whether gradients go
    through it."""
    sliding = sliding_window(config)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    of_layers = getattr(config, "per_layer_config", None) or [config] * len(kinds)
    found: dict[int | None, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for number, kind in enumerate(kinds):
        if kind not in _WITHOUT_ATTENTION:
            of_kind = found[sliding if "sliding" in kind else None]
            size = _size(of_layers[number])
            of_kind[0] += size
            of_kind[1] += size * (number < len(passed) and passed[number])
    return tuple(Attention(size, trained, window) for window, (size, trained) in found.items())


def _size(config: Any) -> float:
    """Heads times head dimension of a layer with this configuration."""
    heads = getattr(config, "num_attention_heads", None) or 0
    if getattr(config, "qk_head_dim", None):  # keys and values of different sizes
        return float(heads * (config.qk_head_dim + config.v_head_dim) / 2)
    return float(heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)))


def _pairs(span: Span, window: int | None) -> int:
    """Of a new token and one that it sees, itself included."""
    whole, before = sum(span), span.before
    return _pairs_of_text(whole, window) - _pairs_of_text(before, window)


def _pairs_of_text(tokens: int, window: int | None) -> int:
    near = tokens if window is None else min(tokens, window)
    return near * (near + 1) // 2 + (tokens - near) * near

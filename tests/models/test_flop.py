"""The operations that are counted are those that torch does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import of_family
from tiny import tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from ppo_engine.models.flop import Attention, Costs, Span
from ppo_engine.models.freezing import prepare_for_training
from ppo_engine.models.value_model import value_model_from_policy
from ppo_engine.pretrained.architecture import checkpoint_gradients, make_repeatable
from ppo_engine.settings.schema import LoraConfig, ModelConfig

ROWS, TOKENS = 2, 7


def trained(model: Any, config: ModelConfig) -> Any:
    make_repeatable(model)
    model.set_attn_implementation("eager")  # the operations of others have no counts
    model.set_experts_implementation("eager")
    return prepare_for_training(model, config, "CAUSAL_LM", torch.float32)


def done(model: Any, gradients: bool) -> tuple[int, int]:
    """What torch does in a pass: products with matrices, and of attention, of all pairs."""
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
        logits = model(input_ids=ids, use_cache=False).logits
        if gradients:
            logits.sum().backward()
    found = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in found.items() if "bmm" in str(op))
    return sum(found.values()) - attention, attention


@pytest.mark.parametrize(
    ("family", "sizes", "config"),
    [
        ("llama", {}, ModelConfig()),
        ("llama", {"tie_word_embeddings": False, "head_dim": 16}, ModelConfig()),
        ("llama", {"num_hidden_layers": 3}, ModelConfig(trainable_layers=1)),
        ("llama", {"num_hidden_layers": 3}, ModelConfig(trainable_layers=2)),
        ("llama", {}, ModelConfig(lora=LoraConfig(rank=4))),
        ("gpt2", {}, ModelConfig()),
        ("opt", {"word_embed_proj_dim": 16}, ModelConfig()),
        ("qwen2_moe", {}, ModelConfig()),
        ("mixtral", {}, ModelConfig(trainable_layers=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("gradients", [False, True])
def test_products_are_those_that_torch_counts(family, sizes, config, gradients):
    model = trained(of_family(family, **sizes), config)
    costs, spans = Costs.of(model), [Span(0, TOKENS)] * ROWS
    products, attention = done(model, gradients)
    of_matrices = replace(costs, attention=()).flop(spans, ROWS * TOKENS, gradients=gradients)
    assert of_matrices == products
    of_attention = costs.flop(spans, ROWS * TOKENS, gradients=gradients) - of_matrices
    assert of_attention * TOKENS**2 == attention * (TOKENS * (TOKENS + 1) / 2)


def test_a_pass_of_the_value_model_has_no_logits():
    policy = tiny_model()
    assert Costs.of(value_model_from_policy(policy, tiny_tokenizer(), 0)) == replace(
        Costs.of(policy), head=0, head_trained=False
    )


def test_what_is_run_again_is_not_counted():
    model = tiny_model()
    costs = Costs.of(model.train())
    checkpoint_gradients(model)
    assert Costs.of(model) == costs


def test_what_is_frozen_has_no_gradients():
    costs = Costs.of(tiny_model().requires_grad_(False))
    assert costs.flop([Span(0, 3)], 2, gradients=True) == costs.flop([Span(0, 3)], 2)


def test_layers_that_do_not_run_are_not_counted():
    costs = Costs(weights=6, attention=(Attention(5, trained=2),), head=7, trained=4, passed=3)
    spans = [Span(0, 3)]
    half, whole = (costs.flop(spans, 2, gradients=True, layers=x) for x in (0.5, 1.0))
    assert whole - half == (2 * 6 * 3 + 4 * 5 * 6) / 2


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("span", [Span(0, 9), Span(3, 1), Span(3, 6), Span(9, 0)])
def test_a_token_sees_itself_and_those_before_within_the_window(span, window):
    costs = Costs(weights=0, attention=(Attention(5, trained=2, window=window),))
    pairs = sum(min(n, window or n) for n in range(span.before + 1, sum(span) + 1))
    assert costs.flop([span], 0) == 4 * 5 * pairs
    assert costs.flop([span] * 2, 0, gradients=True) == 2 * (4 * 5 + 8 * 2) * pairs


def test_layers_differ_in_how_far_they_look():
    mixed = Costs.of(of_family("gemma2", sliding_window=8, head_dim=8))
    assert mixed.attention == (Attention(32, 32, 8), Attention(32, 32, None))
    hybrid = Costs.of(of_family("qwen3_next"))  # its other layers have no pairs
    assert sum(part.size for part in hybrid.attention) == 0 < hybrid.weights

"""The least time a step can take on a machine: its matrix FLOP and weight bytes.

With B responses, P_b tokens in the prompt of response b, T tokens in every response, L_b = P_b + T,
and for the model (all are one architecture): W the elements of the decoder layers' matrices, V·H
those of the output matrix, A = layers x heads x head dimension, s bytes per element of the compute
dtype.

A forward pass over n_b tokens of each sequence, with logits at k positions:

    FLOP  = 2·W·Σn_b + 4·A·Σ n_b(n_b+1)/2 + 2·V·H·k     (causal attention: scores and sums)
    bytes = s·(W + V·H where k > 0)

    generate    forward(P_b, k = B), then T-1 passes, one for each further token:
                FLOP = 2·(W + V·H)·B + 4·A·Σ(P_b + t), bytes = s·(W + V·H)
    score       forward(L_b) of the reward model
    advantages  forward(L_b - 1, k = B·T) of the reference, forward(L_b - 1) of the critic
    update      epochs x 3 x (forward(L_b - 1, k = B·T) of the policy + forward(L_b - 1) of the
                critic): once forward, twice backward (bytes x 2: a backward pass reads W once)

Of GRPO, whose rewards are a function's and which has no critic, the same but for

    generate    the prefill once for each prompt: its groups share keys and values
    score       nothing
    advantages  the pass of the reference alone
    update      epochs x 3 x forward(L_b - 1, k = B·T) of the policy

Of PPO whose four roles are adapters in the last layers of one base, where a forward pass of those
layers has their share of W and A:

    generate    the same
    score       the frozen layers below once, forward(L_b), for all roles and epochs; then the last
                ones, forward(L_b)
    advantages  the last layers alone
    update      epochs x 2 x the last layers of the policy and of the critic: the base has no
                gradient, so a backward pass multiplies once

Each pass takes at least the longer of FLOP / matrix rate and bytes / read bandwidth, and the
passes follow each other. The policy's log-probs before the update need no pass of their own: the
sampler has computed them. Not counted, which keeps the floor below what anyone can reach: padding,
the KV cache, activations, softmax and norms, the optimizer's bytes, scalar heads, adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.machine import Ceilings
from ppo_engine.models.flop import Attention, Costs, Span


@dataclass(frozen=True)
class Shape:
    """What the FLOP and bytes of a causal language model follow from; counts of elements."""

    layer_weights: int  # W
    head_weights: int  # V·H
    attention: int  # A
    cache: int  # keys and values of one token, all layers
    parameters: int  # all of them, a tied embedding counted once
    layers: int = 1

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a Hugging Face configuration, without making any weight."""
        with torch.device("meta"):
            # What other attention does in a pass hangs on what its masks hold.
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        costs = Costs.of(model)
        attention = int(sum(part.size for part in costs.attention))
        return cls(
            layer_weights=int(costs.weights),
            head_weights=int(costs.head),
            attention=attention,
            cache=2 * attention // config.num_attention_heads * config.num_key_value_heads,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=config.num_hidden_layers,
        )

    def some(self, layers: int) -> Shape:
        """That of so many of its layers, which are alike, with the head."""
        return replace(
            self,
            layer_weights=self.layer_weights * layers // self.layers,
            attention=self.attention * layers // self.layers,
            layers=layers,
        )

    @property
    def costs(self) -> Costs:
        return Costs(self.layer_weights, (Attention(self.attention),), self.head_weights)


@dataclass(frozen=True)
class Pass:
    """One pass over a model's weights."""

    flop: float
    elements: float  # of weights read

    def times(self, flop: float, elements: float) -> Pass:
        return Pass(self.flop * flop, self.elements * elements)

    def seconds(self, ceilings: Ceilings, dtype: torch.dtype) -> float:
        return max(
            self.flop / ceilings.matmul[dtype], self.elements * dtype.itemsize / ceilings.read
        )


def forward(shape: Shape, lengths: Sequence[int], logits: int = 0) -> Pass:
    """A forward pass over sequences of these lengths, with logits at so many positions."""
    flop = shape.costs.flop([Span(0, n) for n in lengths], logits)
    return Pass(flop, shape.layer_weights + (shape.head_weights if logits else 0))


def passes(
    shape: Shape, prompts: Sequence[int], new_tokens: int, epochs: int
) -> dict[str, list[Pass]]:
    """Every pass that each phase of PPO needs, for prompts of these lengths."""
    whole = [length + new_tokens for length in prompts]
    policy = forward(shape, [n - 1 for n in whole], logits=len(prompts) * new_tokens)
    critic = forward(shape, [n - 1 for n in whole])
    return {
        "generate": [
            forward(shape, prompts, logits=len(prompts)),
            *_decode(shape, prompts, new_tokens),
        ],
        "score": [forward(shape, whole)],
        "advantages": [policy, critic],  # the reference is the policy's equal
        "update": [policy.times(3, 2), critic.times(3, 2)] * epochs,
    }


def shared_base_passes(
    shape: Shape, adapted: int, prompts: Sequence[int], new_tokens: int, epochs: int
) -> dict[str, list[Pass]]:
    """The same of PPO by adapters in the last `adapted` layers of one base."""
    frozen, last = shape.some(shape.layers - adapted), shape.some(adapted)
    whole = [length + new_tokens for length in prompts]
    found = passes(last, prompts, new_tokens, epochs)
    policy, critic = found["advantages"]
    return {
        "generate": passes(shape, prompts, new_tokens, epochs)["generate"],
        "score": [forward(frozen, whole), *found["score"]],
        "advantages": [policy, critic],
        "update": [policy.times(2, 2), critic.times(2, 2)] * epochs,
    }


def grpo_passes(
    shape: Shape, prompts: Sequence[int], group: int, new_tokens: int, epochs: int
) -> dict[str, list[Pass]]:
    """The same of GRPO, with `group` responses to each of the prompts."""
    each = [length for length in prompts for _ in range(group)]
    policy = forward(shape, [n + new_tokens - 1 for n in each], logits=len(each) * new_tokens)
    return {
        "generate": [
            forward(shape, prompts, logits=len(prompts)),
            *_decode(shape, each, new_tokens),
        ],
        "score": [],
        "advantages": [policy],
        "update": [policy.times(3, 2)] * epochs,
    }


def _decode(shape: Shape, prompts: Sequence[int], new_tokens: int) -> list[Pass]:
    """One pass for each token after the first."""
    weights = shape.layer_weights + shape.head_weights
    return [
        Pass(shape.costs.flop([Span(n + t - 1, 1) for n in prompts], len(prompts)), weights)
        for t in range(1, new_tokens)
    ]


def floors(
    needed: Mapping[str, Sequence[Pass]], ceilings: Ceilings, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of each phase, and of the whole `step`."""
    found = {
        phase: sum(one.seconds(ceilings, dtype) for one in each) for phase, each in needed.items()
    }
    return found | {"step": sum(found.values())}

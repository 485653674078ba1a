"""The least time a rollout can take on a machine, in the terms of `e2e_floor`.

Each distinct prompt is read once, a forward pass with logits at its last token; then every response
is written, a token a step, R rows at once where the memory holds so many. With P_b tokens in the
prompt of response b and T_b written, C the keys and values of a token (elements), in compute dtype:

    steps = max(max T_b - 1, ceil(sum (T_b - 1) / R))
    FLOP  = sum_b 2 (W + V H) (T_b - 1) + 4 A sum_t (P_b + t),   t = 1 ... T_b - 1
    bytes = s (W + V H) steps + s C sum_b sum_t (P_b + t)

and the steps take at least the longer of FLOP / matrix rate and bytes / read bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bench.e2e_floor import Pass, Shape, forward
from bench.machine import Ceilings
from ppo_engine.models.flop import Span


def decode(shape: Shape, prompts: Sequence[int], written: Sequence[int], rows: int) -> Pass:
    """All steps after the prompts: tokens of each response's prompt, and that it wrote."""
    steps = [count - 1 for count in written]
    # t from 1 to n: P n + n (n + 1) / 2
    seen = sum(p * n + n * (n + 1) // 2 for p, n in zip(prompts, steps, strict=True))
    weights = shape.layer_weights + shape.head_weights
    times = max(max(steps), math.ceil(sum(steps) / rows))
    flop = shape.costs.flop(list(map(Span, prompts, steps)), sum(steps))
    return Pass(flop, weights * times + shape.cache * seen)


def floor(
    shape: Shape,
    prompts: Sequence[Sequence[int]],
    written: Sequence[int],
    rows: int,
    ceilings: Ceilings,
    dtype: torch.dtype,
) -> float:
    """Seconds, for the token ids of each response's prompt and the tokens that it wrote."""
    distinct = [len(prompt) for prompt in {tuple(prompt) for prompt in prompts}]
    prefill = forward(shape, distinct, logits=len(distinct))
    steps = decode(shape, [len(prompt) for prompt in prompts], written, rows)
    return prefill.seconds(ceilings, dtype) + steps.seconds(ceilings, dtype)

"""`rotary_embedding` of views of a fused product, against transformers' function, eager and
compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Case, Cost, Inputs, Outputs, Run, Size, compiled, normal
from ppo_kernels import rotary_embedding

# (size, rows, query heads, key heads, tokens, width, dtype); of one token, a decode step.
_Shape = tuple[Size, int, int, int, int, int, torch.dtype]
_SHAPES: dict[str, list[_Shape]] = {
    "cpu": [
        ("small", 16, 9, 3, 1, 64, torch.float32),  # SmolLM2-135M
        ("medium", 16, 9, 3, 64, 64, torch.float32),
        ("large", 8, 9, 3, 1024, 64, torch.float32),
        ("large", 8, 9, 3, 1024, 64, torch.bfloat16),
    ],
    "cuda": [
        ("small", 16, 12, 2, 1, 128, torch.bfloat16),  # Qwen2.5-1.5B
        ("medium", 64, 12, 2, 1, 128, torch.bfloat16),
        ("large", 8, 12, 2, 1024, 128, torch.bfloat16),
    ],
}


def cases(device: str) -> list[Case]:
    return [_case(device, *shape) for shape in _SHAPES[device]]


def _case(
    device: str, size: Size, rows: int, heads: int, kv_heads: int, tokens: int, width: int,
    dtype: torch.dtype,
) -> Case:  # fmt: skip
    def inputs(on: torch.device) -> Inputs:
        fused = normal(rows, tokens, heads + 2 * kv_heads, width, device=on, dtype=dtype, seed=1)
        query, key, _ = fused.transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        angles = normal(rows, tokens, width, device=on, dtype=torch.float32, seed=2, scale=3.0)

        def gradient(count: int, seed: int) -> Tensor:
            shape = (rows, tokens, count, width)
            return normal(*shape, device=on, dtype=dtype, seed=seed).transpose(1, 2)

        return {
            "query": query,
            "key": key,
            "cos": angles.cos().to(dtype),
            "sin": angles.sin().to(dtype),
            "grad_query": gradient(heads, 3),
            "grad_key": gradient(kv_heads, 4),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        return rotary_embedding(x["query"], x["key"], x["cos"], x["sin"], impl=impl)

    of_heads = rows * (heads + kv_heads) * tokens * width
    of_angles = 2 * rows * tokens * width
    cost = Cost((of_heads + of_angles) * dtype.itemsize, of_heads * dtype.itemsize, 3 * of_heads)
    return Case(
        op="rotary_embedding",
        size=size,
        shape=f"{rows}x{heads}/{kv_heads}x{tokens}x{width}",
        dtype=dtype,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={
            "transformers": lambda x: _transformers()(x),
            "transformers, compiled": lambda x: _compiled()(x),
        },
        costs={
            "fwd": cost,
            "both": Cost(2 * cost.read, 2 * cost.written, 2 * cost.flops),
        },
        trained=("query", "key"),
        upstream=("grad_query", "grad_key"),
    )


@functools.cache
def _transformers() -> Run:
    """Imported when it is run: it takes seconds."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    apply: Callable[..., Outputs] = apply_rotary_pos_emb
    return lambda x: apply(x["query"], x["key"], x["cos"], x["sin"])


@functools.cache
def _compiled() -> Run:
    return compiled(_transformers())

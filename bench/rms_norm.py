"""`rms_norm`, against torch's own, which is several operations on a CPU, and the module that
transformers writes for Llama and most others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bench.case import Case, Cost, Inputs, Outputs, Size, compiled, normal
from ppo_kernels import rms_norm

# (size, rows, width, dtype): SmolLM2-135M on a CPU, Qwen2.5-1.5B on a GPU.
_SHAPES: dict[str, list[tuple[Size, int, int, torch.dtype]]] = {
    "cpu": [
        ("small", 16, 576, torch.float32),  # a step of decoding: what a call takes
        ("medium", 256, 576, torch.float32),
        ("large", 2048, 576, torch.float32),
        ("large", 2048, 576, torch.bfloat16),
    ],
    "cuda": [
        ("small", 64, 1536, torch.bfloat16),
        ("medium", 1024, 1536, torch.bfloat16),
        ("large", 8192, 1536, torch.bfloat16),
    ],
}
_EPS = 1e-5


def cases(device: str) -> list[Case]:
    return [_case(device, *shape) for shape in _SHAPES[device]]


def _case(device: str, size: Size, rows: int, width: int, dtype: torch.dtype) -> Case:
    def inputs(on: torch.device) -> Inputs:
        return {
            "x": normal(rows, width, device=on, dtype=dtype, seed=1),
            "weight": normal(width, device=on, dtype=dtype, seed=2),
            "grad": normal(rows, width, device=on, dtype=dtype, seed=3),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        return (rms_norm(x["x"], x["weight"], eps=_EPS, impl=impl),)

    one = rows * width * dtype.itemsize
    # Forward x is read and y written; backward the gradient of y and x are read, that of x written.
    return Case(
        op="rms_norm",
        size=size,
        shape=f"{rows}x{width}",
        dtype=dtype,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={
            "torch's": _torchs,
            "torch's, compiled": compiled(_torchs),
            "LlamaRMSNorm": _llamas,
            "LlamaRMSNorm, compiled": compiled(_llamas),
        },
        costs={
            "fwd": Cost(one, one, 4 * rows * width),
            "both": Cost(3 * one, 2 * one, 14 * rows * width),
        },
        trained=("x", "weight"),
        upstream=("grad",),
    )


# --- What one would use instead ------------------------------------------------------------------


def _torchs(x: Inputs) -> Outputs:
    return (F.rms_norm(x["x"], [len(x["weight"])], x["weight"], _EPS),)


def _llamas(x: Inputs) -> Outputs:
    module: Any = SimpleNamespace(weight=x["weight"], variance_epsilon=_EPS)
    return (LlamaRMSNorm.forward(module, x["x"]),)

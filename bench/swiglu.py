"""`swiglu`, of two tensors and of the halves of one product, against PyTorch's, eager and
compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.case import Case, Cost, Inputs, Outputs, Size, compiled, normal
from ppo_kernels import swiglu

# (size, rows, width, dtype, whether they are halves): SmolLM2-135M on a CPU, Qwen2.5-1.5B on a GPU.
_SHAPES: dict[str, list[tuple[Size, int, int, torch.dtype, bool]]] = {
    "cpu": [
        ("small", 16, 1536, torch.float32, True),  # a step of decoding
        ("medium", 1024, 1536, torch.float32, False),
        ("medium", 1024, 1536, torch.bfloat16, False),
        ("large", 8192, 1536, torch.float32, False),
        ("large", 8192, 1536, torch.float32, True),
        ("large", 8192, 1536, torch.bfloat16, False),
        ("large", 8192, 1536, torch.bfloat16, True),
    ],
    "cuda": [
        ("small", 64, 8960, torch.bfloat16, True),
        ("medium", 1024, 8960, torch.bfloat16, False),
        ("large", 8192, 8960, torch.bfloat16, False),
        ("large", 8192, 8960, torch.bfloat16, True),
    ],
}


def cases(device: str) -> list[Case]:
    return [_case(device, *shape) for shape in _SHAPES[device]]


def _case(device: str, size: Size, rows: int, width: int, dtype: torch.dtype, halves: bool) -> Case:
    def inputs(on: torch.device) -> Inputs:
        both = normal(rows, 2 * width, device=on, dtype=dtype, seed=1).chunk(2, -1)
        gate, up = both if halves else (x.contiguous() for x in both)
        grad = normal(rows, width, device=on, dtype=dtype, seed=2)
        return {"gate": gate, "up": up, "grad": grad}

    def ours(x: Inputs, impl: str) -> Outputs:
        return (swiglu(x["gate"], x["up"], impl=impl),)

    one = rows * width * dtype.itemsize
    # Forward gate and up are read and y is written; backward these and the gradient of y are read,
    # and two gradients written.
    return Case(
        op="swiglu",
        variant="halves" if halves else "",
        size=size,
        shape=f"{rows}x{width}",
        dtype=dtype,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={"eager": _torchs, "compiled": compiled(_torchs)},
        costs={
            "fwd": Cost(2 * one, one, 20 * rows * width),
            "both": Cost(5 * one, 3 * one, 50 * rows * width),
        },
        trained=("gate", "up"),
        upstream=("grad",),
    )


# What one would use instead.
def _torchs(x: Inputs) -> Outputs:
    return (F.silu(x["gate"]) * x["up"],)

"""`packed_linear`, against `F.linear` and oneDNN's product with a weight that oneDNN packed, which
torch has as private operators. Packing, once for many products, is not timed."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Cost, Inputs, Outputs, Run, Size, normal
from ppo_kernels import PackedWeight, can_pack, pack_weight, packed_linear, reference

# (size, in, out): SmolLM2-135M's query, key and value; gate and up; down; head
_SHAPES: list[tuple[Size, int, int]] = [
    ("small", 576, 960), ("medium", 576, 3072), ("medium", 1536, 576), ("large", 576, 49152),
]  # fmt: skip


def cases(device: str) -> list[Case]:
    return [
        _case(size, rows, width, outs, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        if device == "cpu" and (dtype == torch.float32 or can_pack(dtype))
        for size, width, outs in _SHAPES
        for rows in (16, 64)
    ]


def _case(size: Size, rows: int, width: int, outs: int, dtype: torch.dtype) -> Case:
    def inputs(on: torch.device) -> Inputs:
        return {
            "x": normal(rows, width, device=on, dtype=dtype, seed=1),
            "weight": normal(outs, width, device=on, dtype=dtype, seed=2, scale=width**-0.5),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        if impl == "reference":  # in float64, which nothing packs
            return (reference.packed_linear(x["x"], x["weight"], None, x["x"].dtype),)
        return (packed_linear(x["x"], _packed(x["weight"]), impl=impl),)

    alternatives: dict[str, Run] = {"F.linear": lambda x: (F.linear(x["x"], x["weight"]),)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        alternatives["oneDNN, packed"] = _onednn
    return Case(
        op="packed_linear",
        size=size,
        shape=f"{rows}x{width}x{outs}",
        dtype=dtype,
        device="cpu",
        inputs=inputs,
        ours=ours,
        alternatives=alternatives,
        costs={
            "fwd": Cost(
                (outs + rows) * width * dtype.itemsize,
                rows * outs * dtype.itemsize,
                2.0 * rows * width * outs,
            )
        },
    )


def _onednn(x: Inputs) -> Outputs:
    packed = _packed_by_onednn(x["weight"], len(x["x"]))
    return (torch.ops.mkldnn._linear_pointwise.default(x["x"], packed, None, "none", [], ""),)


@functools.lru_cache(maxsize=1)
def _packed(weight: Tensor) -> PackedWeight:
    return pack_weight(weight, dtype=weight.dtype)


@functools.lru_cache(maxsize=1)
def _packed_by_onednn(weight: Tensor, rows: int) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight, rows)
    return packed

"""`adamw`, against torch's on float32 weights: fused, or one operation at a time for all; and with
moments in 8 bits, against the same with float32 moments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torchs_adamw

from bench.case import Case, Cost, Inputs, Outputs, Size, normal
from ppo_kernels import adamw, join_master, reference, split_master

# SmolLM2-135M: embedding, and 30 layers of attention (9 heads on 3, of 64), MLP and two norms.
_LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), *[(1536, 576)] * 2, (576, 1536)]
_SMOLLM2 = [(49152, 576), *(30 * [*_LAYER, (576,), (576,)]), (576,)]

_Shapes = Sequence[tuple[int, ...]]
_SHAPES: dict[str, list[tuple[Size, str, _Shapes]]] = {
    "cpu": [
        ("small", "8x64", [(8, 64)]),
        ("medium", "49152x576", [(49152, 576)]),
        ("large", "SmolLM2-135M", _SMOLLM2),
    ],
    "cuda": [
        ("small", "8x64", [(8, 64)]),
        ("medium", "SmolLM2-135M", _SMOLLM2),
        ("large", "187500000", [(187_500_000,)]),  # an eighth of a model of 1.5e9
    ],
}
_LEARNING_RATE, _DECAY, _BETAS, _EPS, _STEP = 0.01, 0.1, (0.9, 0.95), 1e-8, 3


def cases(device: str) -> list[Case]:
    return [
        _case(device, *shape, dtype)
        for shape in _SHAPES[device]
        for dtype in (torch.float32, torch.bfloat16)
    ] + [_case(device, *shape, torch.bfloat16, "8-bit moments") for shape in _SHAPES[device]]


def _case(
    device: str, size: Size, name: str, shapes: _Shapes, dtype: torch.dtype, variant: str = ""
) -> Case:
    """`dtype` of the weights, in bfloat16 with a remainder, and of the gradients."""
    counts = [math.prod(shape) for shape in shapes]
    count = sum(counts)
    blocks = [2 * math.ceil(n / reference.MOMENT_BLOCK) for n in counts]  # numbers of their scales
    halves = dtype == torch.bfloat16

    def inputs(on: torch.device) -> Inputs:
        weights, grads, exp_avg, exp_avg_sq = (
            normal(count, device=on, dtype=torch.float32, seed=seed) for seed in range(4)
        )
        found = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq.square_(), "grads": grads.to(dtype)}
        if halves:
            found["master"] = weights  # for torch's
            weights, found["remainder"] = split_master(weights)
        if variant:  # the reference, and what has float32 moments, begin with the same
            kept = zip(
                *map(reference.quantize_moments, each(exp_avg), each(exp_avg_sq)), strict=True
            )
            codes, codes_sq, scales = (torch.cat([x.flatten() for x in part]) for part in kept)
            found |= {"codes": codes, "codes_sq": codes_sq, "scales": scales}
            means, squares = zip(
                *map(
                    reference.dequantize_moments, each(codes), each(codes_sq), each_scales(scales)
                ),
                strict=True,
            )
            found["exp_avg"], found["exp_avg_sq"] = (
                torch.cat([x.flatten() for x in part]) for part in (means, squares)
            )
        steps = torch.full((len(shapes),), float(_STEP - 1), device=on)  # torch's counters
        return found | {"weights": weights, "steps": steps}

    def each(x: Tensor) -> list[Tensor]:
        if len(shapes) == 1:
            return [x]  # a view would be a good part of a small call
        return [part.view(shape) for part, shape in zip(x.split(counts), shapes, strict=True)]

    def each_scales(x: Tensor) -> list[Tensor]:
        return [part.view(2, -1) for part in x.split(blocks)]

    def results(x: Inputs, weights: Tensor) -> Outputs:
        return (weights,) if variant else (weights, x["exp_avg"], x["exp_avg_sq"])

    def ours(x: Inputs, impl: str) -> Outputs:
        if impl == "reference":  # which takes float64, whole
            weights = x["weights"]
            if halves:
                weights = join_master(weights.to(dtype), x["remainder"]).to(weights.dtype)
            exact = reference.adamw(
                weights, x["grads"], x["exp_avg"], x["exp_avg_sq"], step=_STEP,
                learning_rate=_LEARNING_RATE, betas=_BETAS, eps=_EPS, weight_decay=_DECAY,
                grad_scale=1.0,
            )  # fmt: skip
            # Half the memory, of a whole model.
            return tuple(map(Tensor.float, exact[:1] if variant else exact))
        if variant:
            return step(x, "codes", "codes_sq", impl, each_scales(x["scales"]))
        return step(x, "exp_avg", "exp_avg_sq", impl)

    def step(
        x: Inputs, mean: str, square: str, impl: str = "auto", scales: list[Tensor] | None = None
    ) -> Outputs:
        adamw(
            *map(each, (x["weights"], x["grads"], x[mean], x[square])),
            remainder=each(x["remainder"]) if halves else None, moment_scales=scales, step=_STEP,
            learning_rate=_LEARNING_RATE, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, impl=impl,
        )  # fmt: skip
        return results(x, x["weights"])

    def torchs(x: Inputs, fused: bool) -> Outputs:
        """All in float32; bfloat16 weights are a copy of theirs."""
        master = x["master"] if halves else x["weights"]
        grads = each(x["grads"].float())
        torchs_adamw(
            each(master), grads, each(x["exp_avg"]), each(x["exp_avg_sq"]), [],
            list(x["steps"].unbind()), foreach=not fused, fused=fused,
            capturable=device == "cuda", amsgrad=False, beta1=_BETAS[0], beta2=_BETAS[1],
            lr=_LEARNING_RATE, weight_decay=_DECAY, eps=_EPS, maximize=False,
        )  # fmt: skip
        return results(x, x["weights"].copy_(master) if halves else master)

    # Bytes that are read and written; of scales two numbers for 256.
    kept = (2 + 2 if halves else 4) + (2 + 8 / reference.MOMENT_BLOCK if variant else 8)
    with_float32 = {"float32 moments": lambda x: step(x, "exp_avg", "exp_avg_sq")}
    return Case(
        op="adamw",
        size=size,
        shape=name,
        dtype=dtype,
        device=device,
        inputs=inputs,
        ours=ours,
        variant=variant,
        alternatives=(with_float32 if variant else {})
        | {
            "AdamW, fused": lambda x: torchs(x, True),
            "AdamW, foreach": lambda x: torchs(x, False),
        },
        costs={"fwd": Cost((kept + dtype.itemsize) * count, kept * count, 20 * count)},
        chunk=2**22,
        shared=("steps", "scales"),
        changed=(
            "weights",
            "remainder",
            "master",
            "exp_avg",
            "exp_avg_sq",
            "codes",
            "codes_sq",
            "scales",
            "steps",
        ),
    )

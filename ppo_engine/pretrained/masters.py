"""Weights in the compute dtype. A bfloat16 parameter that is trained has, as its attribute
`master_remainder` (int16), the bits that are missing to its float32 master
(`ppo_kernels.split_master`).

A deep copy of a parameter has no remainder: what is copied to be trained is joined first, as
`in_fp32` does (`pretrained.storage`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ppo_engine.pretrained.architecture import SCORE_HEADS, unwrap
from ppo_kernels import join_master, split_master


def to_compute_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model itself, its weights in `dtype`, float32 or bfloat16, from their masters: as
    `from_pretrained(dtype=dtype)` has them, but that a score head stays in float32. In bfloat16,
    those that require gradients get their remainder; the others are rounded.

    After the model is on its device and frozen where it is to be. Quantized weights stay.
    """
    inner = unwrap(model)
    wanted = compute_dtypes(inner, dtype)
    for name, parameter in inner.named_parameters():
        if not parameter.is_floating_point():
            continue
        whole, remainder = master(parameter).contiguous(), None
        if wanted(name) == torch.bfloat16:
            whole, remainder = split_master(whole)
        parameter.data = whole
        vars(parameter).pop("master_remainder", None)
        if remainder is not None and parameter.requires_grad:
            parameter.master_remainder = remainder
    # Those that are not saved, such as the frequencies of a rotary embedding, are made in float32.
    saved = inner.state_dict().keys() if dtype != torch.float32 else None
    for name, buffer in inner.named_buffers():
        if buffer.is_floating_point() and (saved is None or name in saved):
            buffer.data = buffer.to(wanted(name))
    return model


def compute_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """In what the weight of a name computes, in a `model` without its wrapper whose others do so in
    `dtype`."""
    kept = kept_in_fp32(model, dtype)

    def wanted(name: str) -> torch.dtype:
        of_head = name.split(".")[0] in SCORE_HEADS
        return torch.float32 if of_head or kept(name) else dtype

    return wanted


def kept_in_fp32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether the family of `model` keeps the weight of a name in float32 where the others are in
    `dtype`, such as the biases of a router: as transformers does when it loads them."""
    kept = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or ()
    patterns = [re.compile(part.replace("*", ".*")) for part in kept]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def master(x: Tensor, device: torch.device | str | None = None) -> Tensor:
    """The float32 values of a parameter or another tensor, on `device`; `x` itself where it is
    that already. Without gradient."""
    remainder = getattr(x, "master_remainder", None)
    x = x.detach().to(device)
    return x.float() if remainder is None else join_master(x, remainder.to(device))


@torch.no_grad()
def set_master(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter float32 `values`, in place: rounded to its dtype, with what is left in its
    remainder, if it has one."""
    remainder: Tensor | None = getattr(parameter, "master_remainder", None)
    if remainder is None:
        parameter.copy_(values)
        return
    whole, rest = split_master(values)
    parameter.copy_(whole)
    remainder.copy_(rest)

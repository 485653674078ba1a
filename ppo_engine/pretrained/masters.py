"""Weights in the compute dtype. A bfloat16 parameter that is trained has, as its attribute
`master_remainder` (int16), the bits that are missing to its float32 master
(`ppo_kernels.split_master`).

A deep copy of a parameter has no remainder: what is copied to be trained is joined first, as
`in_fp32` does (`pretrained.storage`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_engine.errors import UserError
from ppo_engine.pretrained.architecture import SCORE_HEADS, decoder_layers, unwrap
from ppo_kernels import join_master, split_master


def to_compute_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model itself, its weights in `dtype`, float32 or bfloat16, from their masters: as
    `from_pretrained(dtype=dtype)` has them, but that a score head stays in float32. In bfloat16,
    those that require gradients get their remainder; the others are rounded.

    After the model is on its device and frozen where it is to be. Quantized weights stay, and so
    do frozen ones that are in their dtype, which other models may share.
    """
    inner = unwrap(model)
    wanted = compute_dtypes(inner, dtype)
    for name, parameter in inner.named_parameters():
        if not parameter.is_floating_point():
            continue
        stays = parameter.dtype == wanted(name) and not parameter.requires_grad
        whole, remainder = parameter.data if stays else master(parameter).contiguous(), None
        if wanted(name) == torch.bfloat16 and not stays:
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


@contextmanager
def computing_in_fp32(model: Any) -> Iterator[None]:
    """Inside, `model` computes in float32, as probes need it, whatever dtype its weights are kept
    in: those of a decoder layer are converted while it runs, all others meanwhile. So there is
    never a second copy of more than a layer, the embeddings and the head."""
    inner = unwrap(model)
    try:
        layers = [*decoder_layers(inner)]
    except UserError:  # none were found
        layers = []
    within = {id(x) for layer in layers for x in _floats(layer)}
    kept: list[tuple[Tensor, Tensor]] = []
    handles = []

    def widen(tensors: list[Tensor]) -> None:
        for x in tensors:
            if x.dtype in (torch.bfloat16, torch.float16):
                kept.append((x, x.data))
                x.data = x.data.float()

    def restore(count: int) -> None:
        while len(kept) > count:
            x, before = kept.pop()
            x.data = before

    try:
        widen([x for x in _floats(inner) if id(x) not in within])
        outside = len(kept)
        for layer in layers:
            handles += [
                layer.register_forward_pre_hook(lambda layer, _: widen(_floats(layer))),
                layer.register_forward_hook(lambda *_: restore(outside), always_call=True),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore(0)


def _floats(module: nn.Module) -> list[Tensor]:
    """Its weights and buffers, but for quantized ones."""
    found = itertools.chain(module.parameters(), module.buffers())
    return [x for x in found if type(x) in (nn.Parameter, Tensor)]


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

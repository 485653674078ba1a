"""Whether weights are those that they were: a short text that tells."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppo_engine.models.offload import address


def fingerprints(models: Mapping[str, Any]) -> dict[str, str]:
    """Of each model, by its name. They differ where bits of weights do, but for weights of one
    tensor that have changed places: sums, as fast as memory, and on a GPU without a copy."""
    sums: dict[int, int] = {}  # of tensors that several models have
    return {name: _fingerprint(model, sums) for name, model in models.items()}


def _fingerprint(model: Any, sums: dict[int, int]) -> str:
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        where = address(parameter)
        if where not in sums:
            sums[where] = _sum_of_bits(parameter.detach())
        found.update(f"{name} {tuple(parameter.shape)} {sums[where]}\n".encode())
    return found.hexdigest()[:16]


def _sum_of_bits(x: Tensor) -> int:
    """Of the weights as whole numbers of 64 bits, modulo as many; of a few odd ones as bytes."""
    bits = x.reshape(-1).view(torch.uint8)
    if bits.numel() % 8 == 0 and bits.storage_offset() % 8 == 0:
        bits = bits.view(torch.int64)
    return int(bits.sum(dtype=torch.int64))

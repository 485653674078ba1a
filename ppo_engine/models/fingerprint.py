"""Whether weights are those that they were: a short text that tells."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppo_engine.models.offload import address

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 18  # weights whose 64 bits stay in cache


def fingerprints(models: Mapping[str, Any]) -> dict[str, str]:
    """Of each model, by its name. They differ where bits of weights do, but for weights of one
    tensor that have changed places; a hash of all bytes would take ten times as long."""
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
    pieces = x.reshape(-1).view(_BITS[x.element_size()]).split(_PIECE)
    return int(torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum())

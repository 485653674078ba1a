"""Weights that differ in a bit have another fingerprint."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from ppo_engine.models.fingerprint import fingerprints


def of(model: nn.Module) -> str:
    return fingerprints({"it": model})["it"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_bit_counts(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    expected = of(model)
    assert of(copy.deepcopy(model)) == expected
    for parameter in model.parameters():
        bits = parameter.detach().view(-1).view(torch.uint8)
        for place in (0, len(bits) // 2, len(bits) - 1):
            bits[place] ^= 64
            assert of(model) != expected
            bits[place] ^= 64
    assert of(model) == expected


def test_tensors_of_an_odd_size() -> None:
    layer = nn.Linear(3, 1)
    expected = of(layer)
    with torch.no_grad():
        layer.bias += 1
    assert of(layer) != expected
    whole = torch.arange(9.0)
    layer.weight = nn.Parameter(whole[1:4].view(1, 3))  # not where 8 bytes begin
    assert len(of(layer)) == 16


def test_models_that_share_a_tensor() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    alone = of(other)
    assert fingerprints({"one": one, "other": other}) == {"one": of(one), "other": alone}

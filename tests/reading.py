"""What models say of padded tensors of tokens, through the engine's `Reader`."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import Row, TokenRows, scored
from ppo_engine.models.value_model import read_values


def token_values(model: Any, ids: Tensor, mask: Tensor, start: int = 0) -> Tensor:
    """A critic's value at every token from column `start` on, [B, L - start], 0 at padding."""
    real = mask.bool()
    rows = []
    for text, kept in zip(ids, real, strict=True):
        tokens = text[kept].tolist()
        rows.append(Row(tokens, [*range(len(tokens))], [0] * len(tokens)))
    reader = Reader(model)
    values = read_values(model, reader, reader.stack(rows))
    return values.new_zeros(ids.shape).masked_scatter(real, values)[:, start:]


def sequence_scores(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """A reward model's scores, [B]."""
    reader = Reader(model)
    rows = [scored(text[kept].tolist()) for text, kept in zip(ids, mask.bool(), strict=True)]
    return read_values(model, reader, reader.stack(rows))


def by_column(mask: Tensor, found: Tensor) -> Tensor:
    """What was found of the tokens under `mask`, row by row, in its place [B, T]; else 0."""
    return found.new_zeros(mask.shape).masked_scatter(mask, found)


def spied(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> list[TokenRows]:
    """What `reader` reads from now on."""
    read: list[TokenRows] = []
    inner = reader.read
    monkeypatch.setattr(reader, "read", lambda rows, *more: read.append(rows) or inner(rows, *more))
    return read

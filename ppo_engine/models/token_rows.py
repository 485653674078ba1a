"""Rows of tokens: what a model reads in one forward pass, and which of it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """The tokens of one forward pass: `[B, L]` tensors, padded on the right, as not every family
    of models heeds the mask of padding before a text (`architecture.real_tokens_first`)."""

    ids: Tensor
    positions: Tensor | None  # None: one example per row, padding masked
    trained: Tensor  # bool; never a row's first token, which nothing predicts
    owners: Tensor  # index of the example that a token belongs to; -1 is padding

    @property
    def mask(self) -> Tensor | None:
        """True is a real token, where rows are padded; None where they are packed."""
        return self.owners >= 0 if self.positions is None else None

    @cached_property
    def indices(self) -> tuple[Tensor, ...]:
        """Row and column of each trained token, row by row. Found once: a GPU is waited for."""
        return self.trained.nonzero(as_tuple=True)

    @property
    def targets(self) -> Tensor:
        """The trained tokens, row by row: `[tokens]`."""
        return self.ids[self.indices]


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Rows of one length, padded on the left, and the mask of real tokens."""
    width = max((len(row) for row in rows), default=0)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return ids, mask

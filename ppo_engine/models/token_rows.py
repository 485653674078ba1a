"""Rows of tokens: what a model reads in one forward pass, and where its states are wanted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_engine.models.segments import Segments, pick


class Row(NamedTuple):
    """A text as a model reads it: its tokens up to the last whose state is wanted, as no state
    depends on later ones."""

    ids: Sequence[int]
    places: Sequence[int]  # of the tokens whose states are wanted, ascending
    targets: Sequence[int]  # the token behind each of them; 0 where that is not known


def predicting(ids: Sequence[int], trained: Sequence[bool]) -> Row:
    """The states that predict the `trained` tokens; the first, which nothing predicts, is none."""
    places = [place - 1 for place, is_trained in enumerate(trained) if is_trained]
    end = places[-1] + 1 if places else 1
    return Row(ids[:end], places, [ids[place + 1] for place in places])


def scored(ids: Sequence[int]) -> Row:
    """The state at the end of a text."""
    return Row(ids, [len(ids) - 1], [0])


@dataclass(frozen=True)
class TokenRows:
    """The rows of one forward pass: packed, end to end in one row without padding; or each padded
    on the right, as not every family of models heeds the mask of padding before a text."""

    ids: Tensor  # [1, T] packed; [B, L] padded
    places: Tensor  # [n] of the states that are wanted, in `ids` flattened; row by row
    targets: Tensor  # [n] the tokens behind them
    counts: Sequence[int]  # states of each row
    texts: Sequence[Sequence[int]]  # the tokens of each row
    segments: Segments | None  # of packed ones

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(text) for text in self.texts]

    @property
    def mask(self) -> Tensor:
        """True is a real token, of `[B, L]`; all are where rows are packed."""
        if self.segments is not None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        return torch.arange(self.ids.shape[1], device=self.ids.device) < lengths[:, None]

    @property
    def positions(self) -> Tensor:
        """Of each token in its row, shaped like `ids`."""
        if self.segments is not None:
            return self.segments.positions
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)

    def wanted(self, states: Tensor) -> Tensor:
        """`[n, …]`: those at `places`, of the states `[B, L, …]` of all tokens."""
        return pick(states.flatten(0, 1), self.places)


def stack(rows: Sequence[Row], *, pad: int, device: torch.device, packed: bool) -> TokenRows:
    """The tensors of one forward pass over `rows`."""
    lengths = [len(row.ids) for row in rows]
    width = max(lengths)
    if packed:
        ids = [[token for row in rows for token in row.ids]]
        starts = [0, *itertools.accumulate(lengths)][:-1]
    else:
        ids = [[*row.ids, *[pad] * (width - len(row.ids))] for row in rows]
        starts = [number * width for number in range(len(rows))]
    of_states = [
        [start + place for start, row in zip(starts, rows, strict=True) for place in row.places],
        [target for row in rows for target in row.targets],
    ]
    places, targets = torch.tensor(of_states, dtype=torch.long, device=device)
    return TokenRows(
        ids=torch.tensor(ids, device=device),
        places=places,
        targets=targets,
        counts=[len(row.places) for row in rows],
        texts=[row.ids for row in rows],
        segments=Segments(lengths, device) if packed else None,
    )


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Rows of one length, padded on the left, and the mask of real tokens."""
    width = max((len(row) for row in rows), default=0)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return ids, mask

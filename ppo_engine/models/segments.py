"""Where the texts of a packed row begin and end, and how attention sees each of them alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WASTE = 1.15  # tokens of a bucket with padding, for each without


class Segments:
    """Texts of these `lengths`, one behind the other.

    Attention over them is fast where neighbours are about as long as each other.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def window(self, tokens: int | None) -> int | None:
        """How far back a layer looks, where that is less than the whole of each text."""
        return tokens if tokens and tokens < self.longest else None

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`[texts + 1]` int32: where each begins, and the end of the last."""
        starts = [0, *itertools.accumulate(self.lengths)]
        return torch.tensor(starts, dtype=torch.int32, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its text, `[1, T]`."""
        lengths = torch.tensor(self.lengths, device=self.device)
        starts = self.cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=self._total)
        return (torch.arange(self._total, device=self.device) - starts)[None]

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Neighbours of about the same length, with little padding between them."""
        return [Bucket(lengths, self.device) for lengths in _alike(self.lengths)]

    @property
    def _total(self) -> int:
        return sum(self.lengths)


class Bucket:
    """Neighbouring texts of a packed row as rows of one length, padded on the right."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.width, self.tokens = len(lengths), max(lengths), sum(lengths)
        self._index: _Index | None = None  # none where all are as long as each other
        if min(lengths) < self.width:
            starts = [0, *itertools.accumulate(lengths)]
            # Behind its end a text's last token again, which none of its own tokens sees.
            spread = [
                begin + min(place, length - 1)
                for begin, length in zip(starts, lengths, strict=False)
                for place in range(self.width)
            ]
            real = [
                row * self.width + place
                for row, length in enumerate(lengths)
                for place in range(length)
            ]
            self._index = _Index(*(torch.tensor(x, device=device) for x in (spread, real)))

    def take(self, x: Tensor) -> Tensor:
        """Their tokens `[tokens, …]` as `[rows, width, …]`."""
        if self._index is not None:
            x = _Spread.apply(x, self._index)
        return x.unflatten(0, (self.rows, self.width))

    def give(self, x: Tensor) -> Tensor:
        """The inverse of `take`."""
        x = x.flatten(0, 1)
        return x if self._index is None else pick(x, self._index.real)


class _Index(NamedTuple):
    spread: Tensor  # [rows * width], of the token that stands there
    real: Tensor  # [t], of each token's own place


class _Spread(torch.autograd.Function):
    """Tokens `[t, …]` in their places and, behind a text's last, it again; the gradients of these
    copies are 0, as nothing sees them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: _Index) -> Tensor:
        ctx.index = index
        return x.index_select(0, index.spread)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.index.real), None


def pick(x: Tensor, places: Tensor) -> Tensor:
    """`[n, …]`: those at `places`, each of them once, of `[t, …]`."""
    found: Tensor = _Pick.apply(x, places)
    return found


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.count = places, len(x)
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Not added, as indexing would: no place comes twice.
        zeros = grad.new_zeros(ctx.count, *grad.shape[1:])
        return zeros.index_copy_(0, ctx.places, grad), None


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """`lengths` in runs that padding makes little longer."""
    run: list[int] = []
    for length in lengths:
        longest = max([length, *run])
        if run and (len(run) + 1) * longest > _WASTE * (sum(run) + length):
            yield run
            run = []
        run.append(length)
    if run:
        yield run

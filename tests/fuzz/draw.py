"""Random sizes, masks, values and memory layouts.

Every tensor that `Draw.place` returns is a view into a larger buffer whose other bytes are all
`CANARY`: a NaN in each floating dtype, -1 as an index, true as a mask. Whatever reads beside the
tensor is likely to show it in a result; whatever writes there is found by comparing the buffer.
With `exact_memory`, a buffer ends with its tensor instead, for tools that watch over the heap.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

CANARY = 0xFF
SIZES = sorted(
    {0, 1, 2, 3, 5, 7, 11, 13, 19, 23, 29, 37, 41, 53, 61, 67, 83, 97, 101, 131, 151, 199, 251}
    | {509, 613, 1021, 1549, 2039, 4093, 6007, 8191, 10007, 16381, 20011, 32003, 50257, 65521}
    | {2**k + i for k in range(1, 17) for i in (-1, 0, 1)}
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)

T = TypeVar("T")


class Size(NamedTuple):
    """Bounds of the number of tokens, B T, of T, and of B where it is to be small."""

    least: int
    most: int
    longest: int
    rows: int | None = None


class Layout(NamedTuple):
    """Where the tokens of a case lie: padded `[B, T]`, or packed `[N]`."""

    shape: tuple[int, ...]
    cu_seqlens: Tensor | None  # int64, contiguous; None where padded
    mask: Tensor | None

    def real(self) -> Tensor:
        """Which tokens are real."""
        return torch.ones(self.shape, dtype=torch.bool) if self.mask is None else self.mask

    def real_sequences(self) -> Tensor:
        """`[B]`: which sequences have a real token."""
        if self.cu_seqlens is None:
            return self.real().any(1)
        before = torch.cat((torch.zeros(1, dtype=torch.long), self.real().long().cumsum(0)))
        return before[self.cu_seqlens].diff() > 0


class Draw:
    """A source of random choices, the same for the same seed."""

    def __init__(self, seed: str, exact_memory: bool = False) -> None:
        self.exact_memory = exact_memory
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))

    # --- Numbers ----------------------------------------------------------------------------------

    def maybe(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *options: T) -> T:
        return self.random.choice(options)

    def uniform(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def size(self, least: int, most: int) -> int:
        """0, 1, a prime, or at most 1 away from a power of two, where the bounds allow it."""
        sizes = [n for n in SIZES if least <= n <= most]
        return self.pick(*sizes) if sizes else self.random.randint(least, max(least, most))

    def number(self, value: float) -> float | Tensor:
        """`value`, or a 0-dim tensor of (about) this value."""
        if self.maybe(0.6):
            return value
        dtype = self.pick(torch.float32, torch.float64, torch.bfloat16, torch.int64)
        return self.place(torch.tensor(value).to(dtype))

    def dtypes(self) -> Iterator[torch.dtype]:
        """For each tensor of a case, mostly the same."""
        one = self.pick(None, torch.float32, *FLOATS)
        while True:
            yield one or self.pick(*FLOATS)

    # --- Values -----------------------------------------------------------------------------------

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def chance(self, shape: Sequence[int], probability: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) < probability

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=self.generator)

    def flattened(self, x: Tensor) -> Tensor:
        """`x`; at times constant along a dimension, which `place` may then give stride 0."""
        if x.numel() and self.maybe(0.08):
            along = self.random.randrange(x.ndim)
            return x.narrow(along, 0, 1).expand_as(x).clone()
        return x

    def poison(self, x: Tensor, real: Tensor | None) -> Tensor:
        """`x` with garbage wherever `real` is False."""
        if real is None:
            return x
        # Finite garbage too: a maximum may pass over NaN.
        kinds = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4], dtype=x.dtype)
        return torch.where(real, x, kinds[self.integers(0, len(kinds), x.shape)])

    # --- Tokens -----------------------------------------------------------------------------------

    def shape(self, size: Size) -> tuple[int, int]:
        """`(B, T)` of that size, as far as a size of such a kind allows it."""
        least, most, longest, rows = size
        if rows is not None:
            return self.size(1, rows), self.size(longest // 2, longest)
        some = min(least, 1)
        if self.maybe(0.5):
            columns = self.size(some, min(longest, most))
            per_row = max(columns, 1)
            return self.size(-(-least // per_row), most // per_row), columns
        rows = self.size(-(-least // longest), most)
        per_column = max(rows, 1)
        return rows, self.size(-(-least // per_column), min(longest, most // per_column))

    def mask(self, shape: tuple[int, ...]) -> Tensor | None:
        """Full, empty, ragged at either end of the last dimension, with holes; or none at all."""
        kind = self.pick("none", "none", "full", "empty", "left", "right", "both", "holes", "few")
        if kind == "none":
            return None
        if kind in ("full", "empty"):
            return torch.full(shape, kind == "full")
        if kind in ("holes", "few"):
            mask = self.chance(shape, 0.02 if kind == "few" else self.uniform(0.1, 0.98))
            if len(shape) == 2 and self.maybe(0.5):
                mask &= self.chance((shape[0], 1), 0.7)
            return mask
        place = torch.arange(shape[-1])
        bounds = self.integers(0, shape[-1] + 1, (2, *shape[:-1], 1)).sort(0).values
        first = bounds[0] if kind in ("left", "both") else 0
        last = bounds[1] if kind in ("right", "both") else shape[-1]
        return (place >= first) & (place < last)

    def layout(self, size: Size) -> Layout:
        """Padded or packed tokens; packed ones with empty sequences."""
        if self.maybe(0.65):
            shape: tuple[int, ...] = self.shape(size)
            return Layout(shape, None, self.mask(shape))
        if size.rows is not None:
            rows = range(self.size(1, size.rows))
            lengths = [n for _ in rows for n in (0, self.size(1, size.longest))]
        else:
            lengths, empty, longest = [], self.pick(0.0, 0.2, 0.7), self.size(1, size.longest)
            wanted = 0 if size.least == 0 and self.maybe(0.1) else size.least + 1
            wanted = self.random.randint(wanted, size.most) if wanted else 0
            while sum(lengths) < wanted:
                lengths.append(0 if self.maybe(empty) else self.random.randint(1, longest))
        lengths += [0] * self.pick(0, 0, 1, 3)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        shape = (int(cu_seqlens[-1]),)
        return Layout(shape, cu_seqlens, self.mask(shape))

    # --- Memory -----------------------------------------------------------------------------------

    def place(self, x: Tensor, rows_contiguous: bool = False) -> Tensor:
        """The values of `x` behind random strides and a random offset, among canaries.

        The last dimension has stride 1 where `rows_contiguous`. A dimension along which nothing
        changes may get stride 0.
        """
        plain = self.maybe(0.3)
        sizes = list(x.shape)
        for d in range(x.ndim):
            fixed = rows_contiguous and d == x.ndim - 1
            if sizes[d] > 1 and not fixed and _constant(x, d) and self.maybe(0.8):
                sizes[d] = 1
        order = list(range(x.ndim))  # the fastest last
        if not plain and self.maybe(0.4):
            self.random.shuffle(order)
            if rows_contiguous and x.ndim:
                order = [d for d in order if d != x.ndim - 1] + [x.ndim - 1]
        strides, extent = [0] * x.ndim, 1
        for d in reversed(order):
            fixed = rows_contiguous and d == x.ndim - 1
            step = 1 if plain or fixed else self.pick(1, 1, 1, 2, 3)
            strides[d] = extent * step
            gap = 0 if plain else self.pick(0, 0, 1, 3, 8)
            extent = strides[d] * max(sizes[d], 1) + gap
        before = self.random.randrange(20)
        return placed(x, sizes, strides, *((0, 0) if self.exact_memory else (before, 20)))


def placed(x: Tensor, sizes: list[int], strides: list[int], before: int, after: int) -> Tensor:
    """`x` in a buffer of canaries, with room (in elements) before and after it.

    A size of 1 where `x` has more becomes stride 0.
    """
    extent = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    count = before + (extent if x.numel() else 0) + after
    buffer = torch.full((count * x.element_size(),), CANARY, dtype=torch.uint8).view(x.dtype)
    view = buffer.as_strided(sizes, strides, before)
    return view.copy_(x[tuple(slice(0, n) for n in sizes)]).expand(x.shape)


def compact(x: Tensor) -> Tensor:
    """The values of `x`, contiguous, among canaries."""
    strides = list(torch.empty(x.shape, device="meta").stride())
    return placed(x, list(x.shape), strides, before=16, after=16)


def _constant(x: Tensor, along: int) -> bool:
    return bool(x.numel()) and torch.equal(x, x.narrow(along, 0, 1).expand_as(x))

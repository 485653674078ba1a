"""Key/value slots: what a model has read of each row that is being written, at a place of its own.

A row's keys and values stand in one slot of each layer, from its first token on, so that rows of
any lengths are written together without padding, finished ones make room for others, and several
copies of a prompt are read once. transformers' own `Cache` writes all rows at the same place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin

from ppo_engine.models.windows import Unsupported, Windows
from ppo_engine.rollout.attention import CURRENT, How, attend_masked
from ppo_engine.spans import span
from ppo_kernels import decode_attention


@dataclass(frozen=True)
class Heads:
    """What a layer keeps of a token."""

    count: int  # of key and value heads
    key_size: int
    value_size: int


class Slots(Cache):
    """Keys `[rows, kv_heads, length, key_size]` and values of every layer, in `dtype`.

    Before each pass of the model, `reading` says which slots it writes and what it attends to.
    """

    def __init__(
        self,
        heads: Sequence[Heads],
        windows: Windows,
        rows: int,
        length: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._slots = [_Layer(self, x, rows, length, device, dtype) for x in heads]
        super().__init__(layers=[*self._slots])
        self.windows = windows
        self.rows = rows
        self.length = length
        self.access: _Access = _Nothing()

    @contextmanager
    def reading(self, access: _Access) -> Iterator[dict[str, Any]]:
        """Arguments of the model's pass inside the block."""
        self.access = access
        token = CURRENT.set(access.attend)
        try:
            yield {
                "past_key_values": self,
                "use_cache": True,
                "attention_mask": access.masks(self.windows),
            }
            access.finish()
        finally:
            CURRENT.reset(token)
            self.access = _Nothing()

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy what the slots `sources` have into `targets`, all at once."""
        for layer in self._slots:
            for x in (layer.keys, layer.values):
                x.index_copy_(0, targets, x[sources])

    def resize(self, kept: Tensor, rows: int, length: int) -> None:
        """Make `rows` slots of `length` tokens, no fewer than there were; the first ones have what
        the slots `kept` had."""
        more = (0, 0, 0, length - self.length, 0, 0, 0, rows - len(kept))
        for layer in self._slots:  # one after the other: not all of them are there twice
            layer.keys = pad(layer.keys[kept], more)
            layer.values = pad(layer.values[kept], more)
        self.rows, self.length = rows, length


def bytes_per_token(heads: Sequence[Heads], dtype: torch.dtype) -> int:
    return sum(x.count * (x.key_size + x.value_size) for x in heads) * dtype.itemsize


class _Layer(CacheLayerMixin):
    """The slots of one layer, as transformers asks a cache for them."""

    is_sliding = False  # its slots are whole; the mask has the window
    keys: Tensor
    values: Tensor

    def __init__(
        self,
        slots: Slots,
        heads: Heads,
        rows: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._slots = slots
        self.hands_on = False  # whether its attention was seen to take what `update` gave, as it is
        shape = (rows, heads.count, length)
        self.keys = torch.zeros(*shape, heads.key_size, device=device, dtype=dtype)
        self.values = torch.zeros(*shape, heads.value_size, device=device, dtype=dtype)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: a layer is made with its slots."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write what a pass made of its tokens; returns what it attends to."""
        return self._slots.access.update(self, key_states, value_states)

    def get_seq_length(self) -> int:
        return 0  # positions are given

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # masks are given

    def get_max_length(self) -> int:
        return self._slots.length


class _Access:
    """What one pass of a model writes into the slots, and what its queries attend to."""

    _queries: Tensor  # their places, [rows, tokens]
    _keys: int  # how many each row attends to, those that its mask forbids included
    _widths: list[tuple[Tensor, int | None]]  # of the masks' windows

    def update(self, layer: _Layer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`keys` and `values` [rows, heads, tokens, size] are those of a layer's new tokens, to be
        written into its slots; returns what is attended to."""
        return self.write(layer.keys, keys), self.write(layer.values, values)

    def write(self, slots: Tensor, new: Tensor) -> Tensor:
        """Write `new` into `slots`, of the keys or the values; returns what is attended to."""
        raise NotImplementedError

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        """Attention `[rows, tokens, heads, size]` of `query` [rows, heads, tokens, size]."""
        return attend_masked(query, keys, values, how)

    def finish(self) -> None:
        """Raise `Unsupported` where something of a pass is not written."""

    def masks(self, windows: Windows) -> Any:
        """The attention mask, or that of each kind of layer."""
        found = windows.masks(self._queries, self._keys)
        each = found if isinstance(found, dict) else {windows.only: found}
        self._widths = [(mask, windows.width(kind)) for kind, mask in each.items()]
        return found

    def width(self, mask: Tensor) -> int | None:
        """The window of a layer, `_keys` where it has none: it tells of which kind it is by the
        mask that it hands on. None for a mask of the model's own making."""
        for ours, width in self._widths:
            if mask is ours:
                return self._keys if width is None else width
        return None


class _Nothing(_Access):
    """Between passes."""


class NewRows(_Access):
    """Rows of `tokens` tokens, padded behind, which have nothing in their slots yet: each attends
    to itself, and row `owners[i]` is written into the slot `targets[i]`."""

    def __init__(self, tokens: int, targets: Tensor, owners: Tensor) -> None:
        self._queries = torch.arange(tokens, device=targets.device)[None]
        self._keys = tokens
        self._targets = targets
        self._owners = owners

    def write(self, slots: Tensor, new: Tensor) -> Tensor:
        new = new.to(slots.dtype)
        slots[:, :, : self._keys].index_copy_(0, self._targets, new[self._owners])
        return new

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        width = self.width(how.mask)
        if width is None or width < self._keys or how.is_special:
            return super().attend(query, keys, values, how)
        found = scaled_dot_product_attention(  # without a mask, kernels skip what is forbidden
            query, keys, values, is_causal=True, scale=how.scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )  # fmt: skip
        return found.transpose(1, 2).contiguous()


class MoreTokens(_Access):
    """`counts[i]` more tokens of the row in the slot `slots[i]`, behind the `starts[i]` that are
    there; padded behind, at the place of the last one."""

    def __init__(
        self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: Any
    ) -> None:
        width = max(counts)
        self._slots = torch.tensor(slots, device=device)
        self.positions = self._queries = torch.tensor(
            [
                [s + min(i, n - 1) for i in range(width)]
                for s, n in zip(starts, counts, strict=True)
            ],
            device=device,
        )  # [rows, tokens]
        real = [(row, i) for row, n in enumerate(counts) for i in range(n)]
        self._rows, self._tokens = torch.tensor(real, device=device).unbind(1)
        self._keys = max(s + n for s, n in zip(starts, counts, strict=True))

    def write(self, slots: Tensor, new: Tensor) -> Tensor:
        places = self.positions[self._rows, self._tokens]
        real = new[self._rows, :, self._tokens]
        slots[self._slots[self._rows], :, places] = real.to(slots.dtype)
        return slots[self._slots, :, : self._keys]


class OneToken(_Access):
    """The next token of each of the first rows, at `positions` [rows].

    Its keys and values are written by the kernel that attends to them, in layers that hand on what
    `update` gave. Some models repeat it before, or attend by themselves: these need it written, as
    does a layer of which nothing is known yet, in the first step over its slots.
    """

    def __init__(self, positions: Tensor, length: int) -> None:
        self._queries = positions[:, None]
        self._keys = length  # of the slots
        self._counts = positions + 1
        self._places: dict[int, Tensor] = {}  # by the number of heads, which layers share
        self._given: tuple[_Layer, Tensor, Tensor] | None = None  # by the last `update`
        self._new: tuple[Tensor, Tensor] | None = None  # of that, where it is not written yet

    def update(self, layer: _Layer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.finish()
        if layer.hands_on:
            rows = len(keys)
            given = layer.keys[:rows], layer.values[:rows]
            self._new = keys, values
        else:
            given = super().update(layer, keys, values)
        self._given = layer, *given
        return given

    def write(self, slots: Tensor, new: Tensor) -> Tensor:
        rows, heads, _, size = new.shape
        if heads not in self._places:
            first = torch.arange(rows * heads, device=new.device).view(rows, heads) * self._keys
            self._places[heads] = (first + self._queries).flatten()
        slots.view(-1, size).index_copy_(
            0, self._places[heads], new.reshape(-1, size).to(slots.dtype)
        )
        return slots[:rows]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        if self._given is not None and keys is self._given[1] and values is self._given[2]:
            self._given[0].hands_on = True
        else:
            self.finish()  # what is new belongs to other slots
        new_keys, new_values = self._new or (None, None)
        self._new = None
        width = self.width(how.mask)
        if width is None:
            if new_keys is not None and new_values is not None:
                self.write(keys, new_keys)
                self.write(values, new_values)
            return super().attend(query, keys, values, how)
        with span("attention"):
            return decode_attention(
                query.squeeze(2), keys, values, self._counts,
                new_keys=None if new_keys is None else new_keys.squeeze(2),
                new_values=None if new_values is None else new_values.squeeze(2),
                scale=how.scale, softcap=how.softcap, window=width, sinks=how.sinks,
            )[:, None]  # fmt: skip

    def finish(self) -> None:
        if self._new is not None:
            raise Unsupported("a layer of it does not attend to what its cache gave, as before")

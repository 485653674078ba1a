"""What a model's frozen lower layers, its trunk, make of a text: kept, and read from there on."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ppo_engine.models.token_rows import TokenRows


class Kept:
    """The states of texts after some layer, `[tokens, H]`, with or without padding behind: views of
    what the passes gave.

    In a causal model those of a text are also those of each text that it begins with.
    """

    def __init__(self) -> None:
        self._texts: list[bytes] = []  # sorted: what begins a text stands right before it
        self._states: dict[bytes, Tensor] = {}

    def add(self, texts: Sequence[Sequence[int]], states: Sequence[Tensor]) -> None:
        for text, found in zip(texts, states, strict=True):
            key = _key(text)
            if self._longer(key) is None:
                insort(self._texts, key)
                self._states[key] = found

    def find(self, texts: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """The states of all `texts`; None where one of them is not known."""
        found = []
        for text in texts:
            longer = self._longer(_key(text))
            if longer is None:
                return None
            found.append(self._states[longer][: len(text)])
        return found

    def clear(self) -> None:
        self._texts.clear()
        self._states.clear()

    def _longer(self, key: bytes) -> bytes | None:
        """The text of this `key`, or one that it begins."""
        place = bisect_left(self._texts, key)
        begins = place < len(self._texts) and self._texts[place].startswith(key)
        return self._texts[place] if begins else None


def _key(text: Sequence[int]) -> bytes:
    """Bytes, as they are compared in no time."""
    return array("q", text).tobytes()


class Level(NamedTuple):
    """A height at which states are kept."""

    depth: int  # decoder layers below
    kept: Kept


class Trunk:
    """The lower ones of a model's decoder `layers`, which give one tensor each, with the `levels`
    at which their states are kept."""

    def __init__(self, layers: nn.ModuleList, levels: Sequence[Level]) -> None:
        self._layers = layers
        self._levels = sorted(levels, reverse=True, key=lambda level: level.depth)

    @contextmanager
    def active(self, rows: TokenRows) -> Iterator[float]:
        """Inside, the model reads `rows` from the highest level on that has all of them, and keeps
        what comes out at those above. Gives the share of the layers that run."""
        share = 1.0
        with ExitStack() as stack:
            for depth, kept in self._levels:
                known = kept.find(rows.texts)
                if known is not None:
                    stack.enter_context(_giving(self._layers[:depth], _joined(known, rows)))
                    share -= depth / len(self._layers)
                    break
                stack.enter_context(_keeping(self._layers[depth - 1], kept, rows))
            yield share


@contextmanager
def _giving(layers: nn.ModuleList, states: Tensor) -> Iterator[None]:
    """Inside, each of `layers` gives these states. The list of a model's layers stays as it is:
    families look up by a layer's number how it attends."""
    try:
        for layer in layers:
            vars(layer)["forward"] = lambda *_, **__: states
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@contextmanager
def _keeping(layer: nn.Module, kept: Kept, rows: TokenRows) -> Iterator[None]:
    """Inside, what `layer` gives is kept; nothing that needs a gradient, or has another shape."""

    def keep(_: nn.Module, __: Any, states: Any) -> None:
        of_tokens = isinstance(states, Tensor) and states.shape[:-1] == rows.ids.shape
        if of_tokens and not states.requires_grad:
            kept.add(rows.texts, _apart(states, rows))

    handle = layer.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _apart(states: Tensor, rows: TokenRows) -> list[Tensor]:
    """Those of each text, `[tokens, H]`, of a pass's `[B, L, H]`; with its padding, if any."""
    if rows.segments is None:
        return [*states]
    return [*states[0].split([len(text) for text in rows.texts])]


def _joined(states: Sequence[Tensor], rows: TokenRows) -> Tensor:
    """The states of each text as one pass has them."""
    if rows.segments is not None:
        return torch.cat([*states])[None]
    return pad_sequence([*states], batch_first=True)

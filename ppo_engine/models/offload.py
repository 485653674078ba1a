"""Frozen weights that wait in the memory of the CPU while nothing reads with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_engine.errors import UserError
from ppo_engine.models.out_of_memory import MemoryRanOut, freeing
from ppo_engine.spans import span


class Offloaded:
    """The weights of a frozen model, on the `device` inside `on_device` and nowhere else.

    On a GPU they wait in pinned memory, from which they are copied while the host goes on. They do
    not change, so nothing is copied back.
    """

    def __init__(self, model: nn.Module, device: torch.device, staying: Collection[int]) -> None:
        """Weights at the addresses `staying` are those of models that stay there: they are not
        moved, and go on being shared."""
        self._device = device
        self._moved: list[tuple[nn.Parameter, Tensor]] = []
        self._uses = 0
        found: dict[Any, Tensor] = {}  # by where they were, which tied weights share
        for parameter in model.parameters():
            if parameter.data_ptr() in staying:
                continue
            place = parameter.data_ptr(), parameter.shape, parameter.stride()
            if place not in found:
                found[place] = torch.empty_like(
                    parameter.data, device="cpu", pin_memory=device.type == "cuda"
                ).copy_(parameter.data)
            parameter.waiting = found[place]  # type: ignore[attr-defined]
            self._moved.append((parameter, found[place]))
        self._rest()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, also in a block within a block, the model can be used."""
        if not self._uses:
            with span("offload"):
                self._bring()
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                self._rest()

    def _bring(self) -> None:
        try:
            freeing(self._fetch)
        except MemoryRanOut:  # freed memory is given back now, which may have been in pieces
            try:
                freeing(self._fetch)
            except MemoryRanOut as error:
                raise UserError(
                    f"Memory ran out while weights that wait on the CPU (run.offload) came back to "
                    f"the GPU ({error}). Lower generation.kv_cache_gib or ppo.micro_batch_tokens."
                ) from None

    def _fetch(self) -> None:
        copies: dict[int, Tensor] = {}
        try:
            for parameter, waits in self._moved:
                if id(waits) not in copies:
                    copy = torch.empty_like(waits, device=self._device)
                    copies[id(waits)] = copy.copy_(waits, non_blocking=True)
                parameter.data = copies[id(waits)]
        except BaseException:  # no memory for all of them
            self._rest()
            raise

    def _rest(self) -> None:
        for parameter, waits in self._moved:
            parameter.data = waits


def address(parameter: Tensor) -> int:
    """Where a weight lies or, if it comes and goes, where it waits, which stays the same."""
    return int(getattr(parameter, "waiting", parameter).data_ptr())

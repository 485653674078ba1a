"""How a model reads rows of tokens: in which passes, and with what around its matrix products."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_engine.memory import free_memory
from ppo_engine.models import probes
from ppo_engine.models.attention import ATTENTION, using
from ppo_engine.models.determinism import is_deterministic
from ppo_engine.models.flop import Costs, Span
from ppo_engine.models.footprint import numbers_kept
from ppo_engine.models.fused import Fused
from ppo_engine.models.offload import Offloaded
from ppo_engine.models.segments import Segments
from ppo_engine.models.token_rows import Row, TokenRows, scored, stack
from ppo_engine.models.trunk import Trunk
from ppo_engine.models.windows import Unsupported, Windows
from ppo_engine.models.work import counting, current_work, passing
from ppo_engine.pretrained import architecture
from ppo_engine.settings.schema import PPOSettings, RewardModelSettings, SFTSettings

ENOUGH = {"cuda": 8192, "cpu": 2048}  # tokens, from which on a pass is no faster a token

# Of what a text before another changes in it; the products of a pass round by its shape. Attention
# that is wrong changes about as much.
_OF_FP32, _ROUNDING = 0.05, 0.2
_FEWEST = 256
_SHARE = 0.5  # of the free memory, for what a pass keeps for its gradients


class Limit(NamedTuple):
    """What one forward pass has at most: for its memory, not the result."""

    tokens: int  # padding included
    rows: int | None = None

    @classmethod
    def of(cls, settings: PPOSettings | RewardModelSettings | SFTSettings, model: Any) -> Limit:
        """As the `settings` have it, for passes of `model`."""
        tokens = settings.micro_batch_tokens
        return cls(_enough(model) if tokens == "auto" else tokens, settings.micro_batch_size)

    @classmethod
    def automatic(cls, model: Any) -> Limit:
        return cls(_enough(model))


class Reader:
    """Reads with `model`, a language model, a classifier, or either with adapters."""

    def __init__(self, model: Any) -> None:
        self._model = architecture.unwrap(model)
        self.device = next(self._model.parameters()).device
        self._fused = Fused(model, self._model.get_input_embeddings().weight.dtype)
        self.costs = Costs.of(self._model)
        self._packed: bool | None = None  # while it reads: whether that is packed
        self.trunk: Trunk | None = None  # frozen layers whose states are kept, if any
        self.offloaded: Offloaded | None = None  # the model's weights, where they wait elsewhere
        if architecture.checkpoints_gradients(self._model):
            self.checkpoint_gradients()

    def checkpoint_gradients(self) -> None:
        """Keep of each layer only what it reads, from here on."""
        # A function, as copies of the model share it; a method would be copied with its reader.
        architecture.checkpoint_gradients(self._model, lambda: self._again())

    @cached_property
    def packs(self) -> bool:
        """Whether texts are packed, end to end in one row: in a probe they must not see each other,
        and read as they do alone."""
        with counting(None):
            return _can_pack(self, self._model)

    def on_device(self) -> AbstractContextManager[None]:
        """Inside, the model can be used, also where its weights wait elsewhere (`offload`)."""
        return nullcontext() if self.offloaded is None else self.offloaded.on_device()

    def stack(self, rows: Sequence[Row]) -> TokenRows:
        """The tensors of one pass."""
        pad = self._model.config.get_text_config().pad_token_id or 0
        return stack(rows, pad=pad, device=self.device, packed=self.packs)

    def read(self, rows: TokenRows, whole: Any = None) -> Any:
        """The output of the base model, or of `whole`, the model around it."""
        base = self._model.base_model
        inputs: dict[str, Any] = {"input_ids": rows.ids, "use_cache": False}
        if rows.segments is not None:
            inputs |= {"position_ids": rows.positions, "segments": rows.segments}
        else:
            inputs |= architecture.base_inputs(base, rows.ids, rows.mask)
        lower = self.trunk.active(rows) if self.trunk else nullcontext(1.0)
        with (
            passing(),
            self._reading(packed=rows.segments is not None),
            self._fused.remade.active(),
            lower as share,
        ):
            self._count(rows, share)
            return (whole or base)(**inputs)

    def _count(self, rows: TokenRows, layers: float) -> None:
        work = current_work()
        if work is not None:
            spans, gradients = [Span(0, n) for n in rows.lengths], torch.is_grad_enabled()
            states, read = len(rows.places), rows.ids.numel()
            work.add(self.costs, spans, states, read=read, gradients=gradients, layers=layers)

    @contextmanager
    def _reading(self, packed: bool | None) -> Iterator[None]:
        before, self._packed = self._packed, packed
        try:
            attention = using(self._model.config, ATTENTION) if packed else nullcontext()
            with attention, self._fused.active() if packed is not None else nullcontext():
                yield
        finally:
            self._packed = before

    def _again(self) -> tuple[Any, Any]:
        """In what a checkpointed layer is run, and in what again while gradients are made: then
        nothing else says how its rows are read."""
        return nullcontext(), self._reading(self._packed)


def enough(config: Any, dtype: torch.dtype, device: torch.device, free: float) -> int:
    """Tokens of a pass, of a model with this configuration, that keep its products busy and fit
    into the `free` bytes."""
    each = config.get_text_config().num_hidden_layers * numbers_kept(config) * dtype.itemsize
    return max(_FEWEST, int(min(ENOUGH[device.type], _SHARE * free / each)))


def _enough(model: Any) -> int:
    weight = next(model.parameters())
    config = architecture.unwrap(model).config
    free = math.inf if is_deterministic() else free_memory(weight.device)
    return enough(config, weight.dtype, weight.device, free)


def plan(lengths: Sequence[int], limit: Limit, *, packed: bool) -> list[list[int]]:
    """Forward passes as indices into `lengths`, the longest of each first.

    As few as the limit allows and, packed, as even as can be: the longest text first, each into
    the pass that has the fewest tokens; the largest comes first. Padded, texts of similar length
    are together, the longest first. A text that is longer than the limit is a pass of its own.
    What is planned together is a mini-batch, so that mini-batches stay as random as they were.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    most = limit.rows or len(lengths)
    if not packed:
        passes: list[list[int]] = []
        for index in longest_first:
            room = passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= limit.tokens
            if not room or len(passes[-1]) == most:
                passes.append([])
            passes[-1].append(index)
        return passes
    fewest = max(math.ceil(sum(lengths) / limit.tokens), math.ceil(len(lengths) / max(most, 1)))
    passes = [[] for _ in range(fewest)]
    emptiest = [(0, number) for number in range(fewest)]  # a heap of tokens and passes
    for index in longest_first:
        used, number = emptiest[0] if emptiest else (limit.tokens, -1)
        if used and used + lengths[index] > limit.tokens:
            used, number = 0, len(passes)
            passes.append([])
            heapq.heappush(emptiest, (used, number))
        passes[number].append(index)
        if len(passes[number]) < most:
            heapq.heapreplace(emptiest, (used + lengths[index], number))
        else:
            heapq.heappop(emptiest)
    # The most tokens first: what comes later fits where they were.
    by_tokens = sorted(passes, key=lambda indices: -sum(lengths[index] for index in indices))
    return [indices for indices in by_tokens if indices]


@torch.no_grad()
def _can_pack(reader: Reader, model: Any) -> bool:
    """Whether texts in one row do not see each other and are read as they are alone, the layers'
    windows included."""
    if not architecture.takes_positions(model.base_model):
        return False
    ids = probes.probe_ids(model)[0].tolist()
    third = len(ids) // 3
    texts = [ids[third:], ids[third:-1], ids[: third + 1]]
    others = [texts[0], texts[1][::-1], texts[2]]

    def read(packed: bool, *texts: list[int]) -> list[Tensor]:
        rows = stack([scored(text) for text in texts], pad=0, device=reader.device, packed=packed)
        if packed:
            rows = replace(rows, segments=_Watched([len(text) for text in texts], reader.device))
            watched.append(rows.segments)
        output = reader.read(rows)
        found = architecture.states_of(output)
        return [*found[0].float().split([len(text) for text in texts])]

    watched: list[Any] = []
    try:
        windows = Windows.of(model.config)
        packed, changed = read(True, *texts), read(True, *others)
        alone = [read(False, text)[0] for text in texts]
        [joined] = read(False, texts[2] + texts[1])  # no longer than the probe, so than a context
    except (Unsupported, TypeError):  # whatever it calls attention is not told where texts begin
        return False
    # How much a text depends on one before it: less of that is rounding.
    rounding = _OF_FP32 if model.get_input_embeddings().weight.dtype == torch.float32 else _ROUNDING
    limit = rounding * (joined[len(texts[2]) :] - alone[1]).norm()
    stays = all((packed[i] - changed[i]).norm() <= limit for i in (0, 2))
    same = all((a - b).norm() <= limit for a, b in zip(packed, alone, strict=True))
    return stays and same and min(x.windows for x in watched) >= windows.count(model.config)


class _Watched(Segments):
    """Counts the layers that say how far back they look."""

    windows = 0

    def window(self, tokens: int | None) -> int | None:
        self.windows += tokens is not None
        return super().window(tokens)

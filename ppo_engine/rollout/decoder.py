"""What a decode loop runs on the device: prompts into slots, and one token more for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from ppo_engine.errors import UserError
from ppo_engine.models.experts import unrouted
from ppo_engine.models.flop import Span
from ppo_engine.models.fused import Fused
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.reader import ENOUGH, Limit, plan
from ppo_engine.models.windows import Unsupported, Windows
from ppo_engine.models.work import current_work, passing
from ppo_engine.pretrained import architecture
from ppo_engine.rollout.attention import attending
from ppo_engine.rollout.graphs import Graphs, Step
from ppo_engine.rollout.products import Products
from ppo_engine.rollout.slots import (
    Heads,
    MoreTokens,
    NewRows,
    OneToken,
    Slots,
    bytes_per_token,
)
from ppo_engine.spans import span
from ppo_kernels import sample, token_logprobs

# Steps between two looks of the host at what was written. On a CPU they run when they are called.
STEPS = {"cuda": 16, "cpu": 1}
# Bytes of slots that stay between rollouts, for the graphs that read them; more are needed by
# what comes after a rollout, and are made anew in the time of a few steps.
STAYING = 4 * 2**30
_FIELDS = 6  # of `_Rows`

_Row = TypeVar("_Row", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Draw:
    """How the next token is chosen."""

    temperature: float
    top_k: int
    top_p: float
    greedy: bool
    ends: tuple[int, ...]  # tokens that end a turn
    min_new_tokens: int  # of a turn; until then no end is drawn


class Seat(NamedTuple):
    """Where a row begins to write."""

    row: int
    token: int  # the last of what it continues, which the model reads first
    length: int  # tokens before that one, which its slot has
    counter: int  # of its first random number
    limit: int  # tokens that it may write


class Written(NamedTuple):
    """What some steps wrote, as the host reads it."""

    tokens: Tensor  # [steps, rows] long; -1 where a row wrote nothing
    logprobs: Tensor  # [steps, rows] fp32
    done: Tensor  # [rows] bool, after these steps
    ready: torch.cuda.Event | None

    def on_host(self) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        """Tokens and log-probs of each row, and whether it is done; waits for the steps."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.tokens.T.tolist(), self.logprobs.T.tolist(), self.done.tolist()


class _Rows:
    """Where each row stands. One tensor `[fields, rows]` long, which one copy sets."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.all = torch.zeros(_FIELDS, rows, dtype=torch.long, device=device)
        self.token, self.length, self.counter, self.written, self.limit, self.done = self.all
        self.done.fill_(1)


class Decoder:
    """A policy that writes over slots.

    Weights may change between two `session`s, in place.
    """

    def __init__(self, policy: LanguageModel, graphs: Graphs | None) -> None:
        """Raises `Unsupported`, or whatever a model raises that cannot be run so."""
        self._model = architecture.unwrap(policy.model)
        self._costs = policy.reader.costs
        self._extra = unrouted(self._model)
        self._takes_positions = architecture.takes_positions(self._model.base_model)
        self.device = policy.device
        self.dtype = policy.dtype
        self._windows = Windows.of(self._model.config)
        self.heads = heads_of(self._model, self.device)
        self._products = Products(policy.model, device=self.device, dtype=self.dtype)
        self._fused = Fused(self._model, self.dtype, products=False)
        self.steps = STEPS[self.device.type]
        self._graphs = graphs
        self._ends: dict[tuple[int, ...], Tensor] = {}  # on the device, where graphs read them
        self._place = torch.zeros((), dtype=torch.long, device=self.device)
        self._seed = torch.zeros((), dtype=torch.long, device=self.device)
        self.slots: Slots | None = None
        self._busy = False

    @property
    def rows(self) -> int:
        return self.slots.rows if self.slots else 0

    @property
    def length(self) -> int:
        return self.slots.length if self.slots else 0

    @property
    def nbytes(self) -> int:
        """Of the slots."""
        return self.rows * self.length * bytes_per_token(self.heads, self.dtype)

    def reserve(self, rows: int, length: int) -> None:
        """Slots for `rows` rows of `length` tokens; what the old ones had is lost."""
        self.release()
        self.slots = Slots(
            self.heads, self._windows, rows, length, device=self.device, dtype=self.dtype
        )
        self._make_rows(rows)

    def resize(self, kept: Sequence[int], rows: int, length: int) -> None:
        """Slots for `rows` rows of `length` tokens, no fewer than they had; the first are those of
        the rows `kept`."""
        assert self.slots is not None
        if self._graphs:
            self._graphs.clear()
        index = torch.tensor(kept, device=self.device)
        self.slots.resize(index, rows, length)
        before = self._rows
        self._make_rows(rows)
        # A row that does not write yet goes on with its last token, behind what it has.
        self._rows.all[:, : len(kept)] = before.all[:, index]

    def release(self) -> None:
        """Give back the slots."""
        self.slots = None
        if self._graphs:
            self._graphs.clear()

    def _make_rows(self, rows: int) -> None:
        self._rows = _Rows(rows, self.device)
        self._tokens = torch.zeros(self.steps, rows, dtype=torch.long, device=self.device)
        self._logprobs = torch.zeros(self.steps, rows, dtype=torch.float32, device=self.device)

    @contextmanager
    def session(self, seed: int) -> Iterator[None]:
        """Inside, the weights are what they are at its start. `seed` is of all its draws."""
        if self._busy:
            raise UserError(
                "The policy is writing a rollout, so an environment cannot let the engine write "
                "another: it may call the model itself, engine.policy.model or its generate."
            )
        self._seed.fill_(seed)
        # peft's layers tell so; what transformers' models have of that name is a method.
        self._adapted = not any(
            getattr(module, "disable_adapters", None) is True for module in self._model.modules()
        )
        self._busy = True
        try:
            with span("packing"), torch.no_grad():
                self._products.refresh()
            yield
        finally:
            self._busy = False
            self._products.release()
            if self._graphs is None or self.nbytes > STAYING:
                self.release()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, in a session, the model reads and writes the slots; outside it is what it was."""
        with (
            torch.no_grad(),
            attending(self._model),
            architecture.evaluating(self._model),
            self._products.active(),
            self._fused.active(),
        ):
            yield

    def read(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Tokens that stand at the beginning of the slots, each with the slots they go to."""
        for part, ids in self._passes(rows):
            width = ids.shape[1]
            places = torch.arange(width, device=self.device)[None].expand_as(ids)
            targets = [target for _, targets in part for target in targets]
            owners = [owner for owner, (_, targets) in enumerate(part) for _ in targets]
            access = NewRows(width, *torch.tensor([targets, owners], device=self.device))
            self.count([Span(0, len(tokens)) for tokens, _ in part], 0, read=ids.numel())
            self._read(ids, places, access)

    def read_more(self, rows: Sequence[tuple[Sequence[int], int, int]]) -> None:
        """Tokens that stand behind others: they, their slot, and how many tokens it has."""
        for part, ids in self._passes(rows):
            _, slots, starts = zip(*part, strict=True)
            counts = [len(tokens) for tokens, *_ in part]
            access = MoreTokens(slots, starts, counts, self.device)
            spans = [Span(*span) for span in zip(starts, counts, strict=True)]
            self.count(spans, 0, read=ids.numel())
            self._read(ids, access.positions, access)

    def _passes(self, rows: Sequence[_Row]) -> Iterator[tuple[list[_Row], Tensor]]:
        """What is read together of `rows`, which begin with their tokens, and the tokens as one
        tensor, padded on the right."""
        limit = Limit(ENOUGH[self.device.type])
        for places in plan([len(row[0]) for row in rows], limit, packed=False):
            part = [rows[place] for place in places]
            width = len(part[0][0])
            ids = [[*tokens, *[tokens[-1]] * (width - len(tokens))] for tokens, *_ in part]
            yield part, torch.tensor(ids, device=self.device)

    def seat(self, seats: Sequence[Seat]) -> None:
        """Let rows begin to write."""
        if not seats:
            return
        rows = [seat.row for seat in seats]
        fields = [[s.token, s.length, s.counter, 0, s.limit, 0] for s in seats]
        self._rows.all[:, torch.tensor(rows, device=self.device)] = torch.tensor(
            fields, device=self.device
        ).T

    def unseat(self, rows: Sequence[int]) -> None:
        """Let rows write no more."""
        if rows:
            self._rows.done[torch.tensor(rows, device=self.device)] = 1

    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None:
        """Let rows change places."""
        assert self.slots is not None
        source = torch.tensor([*rows, *others], device=self.device)
        target = torch.tensor([*others, *rows], device=self.device)
        self.slots.move(source, target)
        self._rows.all[:, target] = self._rows.all[:, source]

    def write(self, rows: int, steps: int, draw: Draw) -> Written:
        """Let the first `rows` rows write `steps` tokens, those that are not done before."""
        if draw.ends not in self._ends:
            self._ends[draw.ends] = torch.tensor(draw.ends, dtype=torch.long, device=self.device)
        self._place.zero_()
        step: Step = partial(self._step, rows, draw)
        if self._graphs:
            kind = rows, draw, self._adapted
            step = self._graphs.step(kind, step, [self._rows.all, self._place])
        with span("decode"), passing():
            for _ in range(steps):
                step()
        return self._to_host(
            self._tokens[:steps, :rows], self._logprobs[:steps, :rows], self._rows.done[:rows] > 0
        )

    def next_logits(self, rows: int) -> Tensor:
        """The logits `[rows, V]` behind the token of each of the first `rows` rows."""
        assert self.slots is not None
        positions = self._rows.length[:rows]
        access = OneToken(positions, self.slots.length)
        ids = self._rows.token[:rows, None]
        with self.slots.reading(access) as arguments:
            output = self._model(**self._inputs(ids, positions[:, None]), **arguments)
        found: Tensor = output.logits[:, 0]
        return found

    def count(self, spans: Sequence[Span], states: int, *, read: int) -> None:
        """Count the new tokens of `spans`, with logits of so many states; `read` with padding."""
        work = current_work()
        if work is not None:
            work.add(self._costs, spans, states, read=read)

    def _step(self, rows: int, draw: Draw) -> None:
        """The next token of each of the first `rows` rows."""
        state = self._rows
        token, length, counter, written, limit, done = state.all[:, :rows]
        logits = self.next_logits(rows)
        ends = self._ends[draw.ends]
        if draw.min_new_tokens and draw.ends:
            early = written < draw.min_new_tokens
            logits[:, ends] = logits[:, ends].masked_fill(early[:, None], -torch.inf)
        with span("sampling"):
            if draw.greedy:
                new = logits.argmax(-1)
                logprobs = token_logprobs(logits, new)
            else:
                new, logprobs = sample(
                    logits, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p,
                    seed=self._seed, offset=counter,
                )  # fmt: skip
        writes = done == 0
        self._tokens[:, :rows].index_copy_(0, self._place[None], torch.where(writes, new, -1)[None])
        self._logprobs[:, :rows].index_copy_(0, self._place[None], logprobs.float()[None])
        self._place += 1
        token.copy_(torch.where(writes, new, token))
        for x in (length, counter, written):
            x += writes
        ended = (new[:, None] == ends).any(1)  # `isin` waits for the GPU
        done.copy_(done | (writes & (ended | (written >= limit))))

    def _read(self, ids: Tensor, places: Tensor, access: Any) -> None:
        assert self.slots is not None
        with span("prefill"), passing(), self.slots.reading(access) as arguments:
            self._model.base_model(**self._inputs(ids, places), **arguments)

    def _inputs(self, ids: Tensor, places: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, **self._extra}
        return inputs | ({"position_ids": places} if self._takes_positions else {})

    def _to_host(self, tokens: Tensor, logprobs: Tensor, done: Tensor) -> Written:
        if self.device.type != "cuda":
            return Written(tokens.clone(), logprobs.clone(), done, None)
        copies = []
        for x in (tokens, logprobs, done):
            copies.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=True))
            copies[-1].copy_(x, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Written(copies[0], copies[1], copies[2], ready)


def heads_of(model: Any, device: torch.device) -> list[Heads]:
    """What each layer of `model` keeps of a token, by a pass that shows it."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.no_grad():
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    found = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or values.ndim != 4:
            raise Unsupported("a layer of it keeps something else than keys and values")
        found.append(Heads(keys.shape[1], keys.shape[3], values.shape[3]))
    return found

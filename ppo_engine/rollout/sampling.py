"""What samples from a policy: sessions in which rows of tokens are continued."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from ppo_engine.errors import UserError
from ppo_engine.memory import free_memory
from ppo_engine.models.determinism import is_deterministic
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.notes import sampling_notes
from ppo_engine.models.out_of_memory import MemoryRanOut, freeing
from ppo_engine.pretrained import architecture
from ppo_engine.pretrained.generation_config import declared_stops
from ppo_engine.rollout import by_generate
from ppo_engine.rollout.decoder import Decoder, Draw
from ppo_engine.rollout.probe import probed_decoder
from ppo_engine.rollout.schedule import FindStop, Request, Response, Schedule, row_bucket
from ppo_engine.rollout.slots import bytes_per_token
from ppo_engine.rollout.stops import StopStrings
from ppo_engine.settings.schema import GenerationConfig

SHARE_OF_FREE = 0.5  # of the memory, for slots, where no budget is set
ALIGNED = 64  # a slot has a multiple of so many tokens

Write = Callable[[Sequence[Request]], list[Response]]


class Sampler:
    """Samples from a policy whose weights may change, in place, between two sessions.

    By the decode loop over key/value slots; by transformers' own `generate` where a probe shows
    that the loop would not give what the model gives.
    """

    def __init__(self, policy: LanguageModel) -> None:
        self.policy = policy
        self._most = sys.maxsize  # rows at a time
        self._note: str | None = None

    @property
    def notes(self) -> list[str]:
        """What a user should know: where a model cannot be sampled from as others are."""
        decoder, note = self._probed
        return ([note] if note else []) + (sampling_notes(self.policy) if decoder is None else [])

    @contextmanager
    def session(
        self, settings: GenerationConfig, *, greedy: bool = False, keep: bool = False
    ) -> Iterator[Write]:
        """Inside, what continues each of some rows by a turn of at most
        `settings.max_new_tokens` tokens.

        From softmax(logits / temperature), restricted to top-k and top-p where these are on;
        `greedy` takes the most likely token instead. All draws have one key, of torch's global
        generator. With `keep`, there will be later turns of the same responses.
        """
        decoder, _ = self._probed
        seed = int(torch.randint(2**62, ()))
        find_stop = self._stop_strings(settings)
        arguments = settings.max_new_tokens, self._draw(settings, greedy), find_stop
        if decoder is None:
            yield lambda requests: self._by_generate(requests, *arguments)
            return
        schedule = Schedule(decoder, keep=keep)

        def write_in(slots: tuple[int, int], requests: Sequence[Request]) -> list[Response]:
            schedule.make_room(requests, *slots)
            return schedule.write(requests, *arguments)

        def write(requests: Sequence[Request]) -> list[Response]:
            nonlocal schedule
            longest = max(len(request.tokens) for request in requests) + settings.max_new_tokens
            while True:
                # What slots have for a later turn does not make way while the memory has room.
                rows = max(len(requests), decoder.rows) if keep else len(requests)
                slots = _size(decoder, min(rows, self._most), longest, settings.kv_cache_gib)
                try:
                    with decoder.working():
                        return freeing(write_in, slots, requests)
                except MemoryRanOut as error:
                    self._halve(min(slots[0], len(requests)), str(error))
                # Nothing of what is half-written is kept: the rows are read and drawn anew.
                decoder.release()
                schedule = Schedule(decoder, keep=keep)

        with decoder.session(seed):
            yield write

    def take_note(self) -> str | None:
        """What is to be said of memory that ran out, once."""
        note, self._note = self._note, None
        return note

    def _halve(self, rows: int, reason: str) -> None:
        """Write half of these rows at a time from here on, as memory ran out for this `reason`."""
        if rows == 1:
            raise UserError(
                f"Memory ran out while a single response was sampled ({reason}). Lower "
                "generation.max_new_tokens or data.max_prompt_tokens, or take a smaller model."
            )
        if is_deterministic():
            raise UserError(
                f"Memory ran out while {rows} responses were sampled at a time ({reason}). As "
                "run.deterministic is set they are not sampled again, fewer at a time, which "
                "rounds otherwise: set generation.kv_cache_gib to less than they take."
            )
        self._most = rows // 2
        self._note = (
            f"Memory ran out while {rows} responses were sampled at a time ({reason}). They were "
            f"sampled again, {self._most} at a time, as all are from here on: more time, but the "
            "same responses up to rounding. Lower generation.kv_cache_gib to begin with that."
        )

    def _by_generate(self, requests: Sequence[Request], *arguments: Any) -> list[Response]:
        try:
            return freeing(by_generate.write, self.policy, requests, *arguments)
        except MemoryRanOut as error:  # what it draws depends on who is sampled together
            raise UserError(
                f"Memory ran out while transformers' generate sampled {len(requests)} responses "
                f"({error}). Lower generation.max_new_tokens, or the number of responses: "
                "ppo.rollout_batch_size, of `generate` batch_size."
            ) from error

    @cached_property
    def _probed(self) -> tuple[Decoder | None, str]:
        return probed_decoder(self.policy)

    def _draw(self, settings: GenerationConfig, greedy: bool) -> Draw:
        stops = [stop for stop in settings.stop if isinstance(stop, int)]
        vocabulary = len(architecture.unwrap(self.policy.model).get_input_embeddings().weight)
        if unknown := [stop for stop in stops if stop >= vocabulary]:
            raise UserError(
                f"generation.stop has the token {unknown[0]}, but the model knows {vocabulary}, "
                "counted from 0: give one of them, or a string."
            )
        ends = {*self.policy.renderer.end_ids, *stops}
        return Draw(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            greedy=greedy,
            ends=tuple(sorted(end for end in ends if end < vocabulary)),  # others are never drawn
            min_new_tokens=settings.min_new_tokens,
        )

    def _stop_strings(self, settings: GenerationConfig) -> FindStop | None:
        strings = [stop for stop in settings.stop if isinstance(stop, str)]
        model = architecture.unwrap(self.policy.model)
        strings += declared_stops(model.generation_config)
        return StopStrings(self.policy.tokenizer, strings) if strings else None


def _size(decoder: Decoder, rows: int, length: int, budget: float | None) -> tuple[int, int]:
    """How many slots, and of how many tokens: for `rows` rows of `length` tokens, or as many as
    the `budget` (GiB) has room for. Raises a UserError where it has room for none."""
    aligned = -(-length // ALIGNED) * ALIGNED
    each = aligned * bytes_per_token(decoder.heads, decoder.dtype)
    if budget is None and is_deterministic():
        room = float(sys.maxsize)
    elif budget is None:
        room = SHARE_OF_FREE * (free_memory(decoder.device) + decoder.nbytes)
    else:
        room = budget * 2**30
    if each > room:
        raise UserError(
            f"The keys and values of one response of {length} tokens, its prompt included, take "
            f"{each / 2**30:.2g} GiB, and there are {room / 2**30:.2g}: "
            + ("free memory" if budget is None else "raise generation.kv_cache_gib")
            + ", or lower generation.max_new_tokens."
        )
    return row_bucket(rows, int(room / each), decoder.steps), aligned

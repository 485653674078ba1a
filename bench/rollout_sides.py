"""The sides of `bench/rollout.py`: ours, and what one would call instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers

from bench.e2e_floor import Shape
from bench.rollout_cases import Case
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.token_rows import pad_left
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.rollout.schedule import Request
from ppo_engine.settings.schema import GenerationConfig

Rows = Sequence[Sequence[int]]
Written = list[list[int]]  # the tokens of each response
Run = Callable[[Rows], Written]

OURS, NO_REFILL, GENERATE = "ours", "no refill", "generate"
SIDES = {
    OURS: "`rollout.sampling.Sampler`, its log-probs recorded",
    NO_REFILL: "the same, in batches of as many rows as the memory holds, one after the other",
    GENERATE: "`model.generate`, in batches likewise",
    "continuous": "`model.generate_batch` of transformers",
}
_PAGE = 256  # tokens of a block of keys and values in `generate_batch`
_PREFILL = 2048  # tokens of a pass there
# What no token is, for `generate_batch`, which takes an empty list for the checkpoint's ends.
_NO_TOKEN = -1


class Sides:
    """The sides of one policy, made as they are asked for, and what they sample with.

    Without `ends` every response has all its tokens.
    """

    def __init__(self, policy: LanguageModel) -> None:
        self.policy = policy
        self.sampler = Sampler(policy)
        self.end_with([])

    def end_with(self, ends: list[int]) -> None:
        """From now on responses end with one of these tokens."""
        self.ends = self.policy.renderer.end_ids = ends

    def run(self, name: str, case: Case) -> Run:
        """What samples a response to each row."""
        batch, new_tokens = case.rows or case.responses, case.new_tokens
        if name == OURS:
            return partial(self._ours, case)
        if name == NO_REFILL:
            return partial(_in_batches, batch, partial(self.write, new_tokens))
        if name == "continuous":
            return partial(self._continuous, case)
        return partial(_in_batches, batch, partial(self._generate, new_tokens))

    def write(self, new_tokens: int, rows: Rows, cache: float | None = None) -> Written:
        """Ours; `cache` is the memory for keys and values in GiB."""
        settings = GenerationConfig(max_new_tokens=new_tokens, kv_cache_gib=cache)
        requests = [Request([*row], i, i * new_tokens) for i, row in enumerate(rows)]
        with self.sampler.session(settings) as write:
            return [response.tokens for response in write(requests)]

    def _ours(self, case: Case, rows: Rows) -> Written:
        if case.rows is None:
            return self.write(case.new_tokens, rows)
        # As long as slots may be, which come in buckets.
        length = _PAGE * math.ceil((max(map(len, rows)) + case.new_tokens) / _PAGE)
        of_token = Shape.of(self.policy.model.config).cache * self.policy.dtype.itemsize
        return self.write(case.new_tokens, rows, case.rows * length * of_token / 2**30)

    def _settings(self, new_tokens: int, ends: Any) -> transformers.GenerationConfig:
        return transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            eos_token_id=ends,
            pad_token_id=self.policy.tokenizer.pad_token_id,
        )

    @torch.no_grad()
    def _generate(self, new_tokens: int, rows: Rows) -> Written:
        device, model = self.policy.device, self.policy.model
        ids, mask = pad_left(rows, self.policy.tokenizer.pad_token_id)
        shipped, settings = model.generation_config, self._settings(new_tokens, self.ends)
        model.generation_config = settings  # else the checkpoint's own fill what is not set
        try:
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device).long(),
                generation_config=settings,
            )
        finally:
            model.generation_config = shipped
        return [until_end(row, self.ends) for row in output[:, len(ids[0]) :].tolist()]

    @torch.no_grad()
    def _continuous(self, case: Case, rows: Rows) -> Written:
        longest = max(map(len, rows)) + case.new_tokens
        blocks = (case.rows or case.responses) * math.ceil(longest / _PAGE)
        found = self.policy.model.generate_batch(
            inputs=[list(row) for row in rows],
            generation_config=self._settings(case.new_tokens, self.ends or _NO_TOKEN),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=_PAGE, num_blocks=blocks, max_batch_tokens=_PREFILL
            ),
        )
        if len(found) < len(rows):
            raise ValueError(f"{len(found)} of {len(rows)} responses came back")
        return [output.generated_tokens for output in found.values()]


def _in_batches(batch: int, run: Run, rows: Rows) -> Written:
    return [x for start in range(0, len(rows), batch) for x in run(rows[start : start + batch])]


def until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Up to and including the first end."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]

"""Sampling: a batch of token rows in, the policy's continuations out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ppo_engine.models import precision
from ppo_engine.models.experts import unrouted
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.token_rows import pad_left
from ppo_engine.pretrained import architecture
from ppo_engine.settings.schema import GenerationConfig
from ppo_kernels import token_logprobs


class Continuation(NamedTuple):
    """What the policy wrote after one row."""

    tokens: list[int]  # up to and including the first EOS
    finished: bool  # it ends with EOS
    logprobs: list[float]  # of the tokens in the distribution they were drawn from, if recorded


@torch.no_grad()
def sample(
    policy: LanguageModel,
    rows: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    greedy: bool = False,
    record_logprobs: bool = False,
) -> list[Continuation]:
    """Continue each of the token `rows` by at most `settings.max_new_tokens` tokens.

    From softmax(logits / temperature), restricted to top-k and top-p where these are on; `greedy`
    takes the most likely token instead. Where the model does not heed padding, rows of the same
    length go together.
    """
    together: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        together[0 if policy.heeds_padding else len(row)].append(index)
    found: dict[int, Continuation] = {}
    for indices in together.values():
        part = [rows[i] for i in indices]
        written = _sample_padded(policy, part, settings, greedy, record_logprobs)
        found |= dict(zip(indices, written, strict=True))
    return [found[index] for index in range(len(rows))]


def _sample_padded(
    policy: LanguageModel,
    rows: Sequence[Sequence[int]],
    settings: GenerationConfig,
    greedy: bool,
    record_logprobs: bool,
) -> list[Continuation]:
    pad = policy.tokenizer.pad_token_id
    padded, mask = pad_left(rows, pad)
    input_ids = torch.tensor(padded, device=policy.device)
    of_model = architecture.unwrap(policy.model)
    shipped = of_model.generation_config
    # With the checkpoint's own generation config (repetition penalty, top-k) the sampled
    # distribution would not be the one whose log-probs are taken; it is restored, to be saved.
    plain = transformers.GenerationConfig(eos_token_id=policy.renderer.end_ids, pad_token_id=pad)
    # The warpers are passed, not configured, so that the recorder comes after them.
    warpers = LogitsProcessorList([] if greedy else _warpers(settings))
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    recorder = _Recorder()
    if record_logprobs:
        warpers.append(recorder)
    of_model.generation_config = plain
    try:
        with precision.compute(policy.device, policy.dtype):
            output = policy.model.generate(
                input_ids=input_ids,
                attention_mask=torch.tensor(mask, device=policy.device).long(),
                logits_processor=warpers,
                **unrouted(of_model),
                generation_config=transformers.GenerationConfig(
                    do_sample=not greedy,
                    **sampling,
                    max_new_tokens=settings.max_new_tokens,
                    eos_token_id=policy.renderer.end_ids,
                    use_cache=policy.continues_from_cache,
                    pad_token_id=pad,
                ),
            )
    finally:
        of_model.generation_config = shipped
    written = output[:, input_ids.shape[1] :]
    logprobs = recorder.logprobs(written).tolist() if record_logprobs else [[]] * len(rows)
    return [
        _until_eos(tokens, set(policy.renderer.end_ids), of_tokens)
        for tokens, of_tokens in zip(written.tolist(), logprobs, strict=True)
    ]


def _until_eos(tokens: list[int], eos_ids: set[int], logprobs: list[float]) -> Continuation:
    """Up to the first EOS, by position and never by comparing with the pad id."""
    end = next((place for place, token in enumerate(tokens) if token in eos_ids), None)
    count = len(tokens) if end is None else end + 1
    return Continuation(tokens[:count], end is not None, logprobs[:count])


def _warpers(settings: GenerationConfig) -> list[LogitsProcessor]:
    """Temperature, top-k and top-p, those that change anything, in the library's order."""
    found: list[LogitsProcessor] = []
    if settings.temperature != 1.0:
        found.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        found.append(TopPLogitsWarper(settings.top_p))
    return found


class _Recorder(LogitsProcessor):
    """Keeps the log-prob of each token that is drawn, which it sees one step later."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._scores is not None:
            self._take(input_ids[:, -1])
        self._scores = scores
        return scores

    def logprobs(self, written: Tensor) -> Tensor:
        """Those of the tokens `written`, [B, T]: fp32. There may have been more steps than these:
        on a GPU, EOS is checked for only now and then."""
        if len(self._found) < written.shape[1]:
            self._take(written[:, -1])
        return torch.stack(self._found[: written.shape[1]], 1)

    def _take(self, tokens: Tensor) -> None:
        assert self._scores is not None
        self._found.append(token_logprobs(self._scores, tokens))

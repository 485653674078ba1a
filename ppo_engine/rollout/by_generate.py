"""Sampling by transformers' own `generate`, for models that the decode loop cannot run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

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

from ppo_engine.models.experts import unrouted
from ppo_engine.models.flop import Span
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.token_rows import pad_left
from ppo_engine.models.work import current_work, passing
from ppo_engine.pretrained import architecture
from ppo_engine.rollout.decoder import Draw
from ppo_engine.rollout.schedule import FindStop, Request, Response
from ppo_kernels import token_logprobs


@torch.no_grad()
def write(
    policy: LanguageModel,
    requests: Sequence[Request],
    limit: int,
    draw: Draw,
    find_stop: FindStop | None = None,
) -> list[Response]:
    """As `Schedule.write`, but that random numbers are torch's, in the order of the batch.

    Where the model does not heed padding, rows of the same length go together.
    """
    responses = [Response(request) for request in requests]
    together: dict[int, list[Response]] = defaultdict(list)
    for response in responses:
        together[0 if policy.heeds_padding else len(response.request.tokens)].append(response)
    for part in together.values():
        tokens, logprobs = _generate(policy, [r.request.tokens for r in part], limit, draw)
        for response, of_row, logprobs_of_row in zip(part, tokens, logprobs, strict=True):
            _take(response, of_row, logprobs_of_row, draw.ends, find_stop)
        _count(policy, part, len(tokens[0]))
    return responses


def _count(policy: LanguageModel, responses: Sequence[Response], steps: int) -> None:
    """Count what is read of rows that all write until the last is done, as with a cache."""
    work = current_work()
    if work is not None:
        spans = [Span(0, len(r.request.tokens) + len(r.tokens) - 1) for r in responses]
        width = max(len(r.request.tokens) for r in responses) + steps - 1
        states = sum(len(r.tokens) for r in responses)
        work.add(policy.reader.costs, spans, states, read=width * len(responses))


def _take(
    response: Response,
    tokens: list[int],
    logprobs: list[float],
    ends: Sequence[int],
    find_stop: FindStop | None,
) -> None:
    """Up to the first end, by position and never by comparing with the pad id, or stop string."""
    place = next((place for place, token in enumerate(tokens) if token in ends), None)
    count = len(tokens) if place is None else place + 1
    stop = find_stop(tokens[:count], 0) if find_stop else None
    response.finished = place is not None or stop is not None
    count = count if stop is None else stop
    response.tokens, response.logprobs = tokens[:count], logprobs[:count]
    response.done = True


@passing()
def _generate(
    policy: LanguageModel, rows: Sequence[Sequence[int]], limit: int, draw: Draw
) -> tuple[list[list[int]], list[list[float]]]:
    """What `generate` writes behind each of the `rows`, with padding, and the log-probs."""
    pad = policy.tokenizer.pad_token_id
    padded, mask = pad_left(rows, pad)
    input_ids = torch.tensor(padded, device=policy.device)
    of_model = architecture.unwrap(policy.model)
    ends = {"eos_token_id": list(draw.ends), "pad_token_id": pad}
    shipped = of_model.generation_config
    # With the checkpoint's own generation config (repetition penalty, top-k) the sampled
    # distribution would not be the one whose log-probs are taken; it is restored, to be saved.
    plain = transformers.GenerationConfig(**ends)
    # The warpers are passed, not configured, so that the recorder comes after them.
    warpers = LogitsProcessorList([] if draw.greedy else _warpers(draw))
    sampling = {} if draw.greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    recorder = _Recorder()
    warpers.append(recorder)
    of_model.generation_config = plain
    try:
        output = policy.model.generate(
            input_ids=input_ids,
            attention_mask=torch.tensor(mask, device=policy.device).long(),
            logits_processor=warpers,
            **unrouted(of_model),
            generation_config=transformers.GenerationConfig(
                do_sample=not draw.greedy,
                **sampling,
                **ends,
                max_new_tokens=limit,
                min_new_tokens=min(draw.min_new_tokens, limit) or None,
                use_cache=policy.continues_from_cache,
            ),
        )
    finally:
        of_model.generation_config = shipped
    written = output[:, input_ids.shape[1] :]
    return written.tolist(), recorder.logprobs(written).tolist()


def _warpers(draw: Draw) -> list[LogitsProcessor]:
    """Temperature, top-k and top-p, those that change anything, in the library's order."""
    found: list[LogitsProcessor] = []
    if draw.temperature != 1.0:
        found.append(TemperatureLogitsWarper(draw.temperature))
    if draw.top_k:
        found.append(TopKLogitsWarper(draw.top_k))
    if draw.top_p < 1.0:
        found.append(TopPLogitsWarper(draw.top_p))
    return found


class _Recorder(LogitsProcessor):
    """Keeps the log-prob of each token that is drawn, which it sees one step later. Logits that are
    no distribution give token 0 and NaN, as of `ppo_kernels.sample`."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._scores is not None:
            self._take(input_ids[:, -1])
        none = ~scores.amax(-1, keepdim=True).isfinite()
        self._scores = scores.masked_fill(none, math.nan)
        if none.any():
            first = torch.full_like(scores, -math.inf)
            first[:, 0] = 0.0
            scores = torch.where(none, first, scores)
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

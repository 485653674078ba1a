"""The one judge of `bench/learning.py`: reward and KL of a saved policy on held-out prompts.

Plain transformers in fp32, nothing of any side. KL: at every token of a sampled response the whole
sum over the vocabulary, p (log p - log q), added up over the response (nats). Its expectation is
that of log p - log q of the sampled tokens, with less noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from ppo_engine.pretrained.loading import quiet_transformers
from ppo_engine.training.evaluation import mean_and_error

_ROWS = 32  # of a pass: its logits are there in fp32, of two models


class Evaluator:
    """Holds the reference and the reward model; `samples` responses to each prompt."""

    def __init__(
        self,
        reference: str,
        reward: str,
        prompt_ids: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        samples: int,
    ) -> None:
        self.reference = _load(AutoModelForCausalLM, reference)
        self.reward = _load(AutoModelForSequenceClassification, reward)
        self.pad, self.end = self.reward.config.pad_token_id, _end_of(reference)
        self.prompts = [list(ids) for ids in prompt_ids for _ in range(samples)]
        self.new_tokens = new_tokens

    def measure(self, policy: str | Path, seed: int) -> dict[str, float]:
        """Means over responses and their standard errors: `reward`, `kl`; tokens: `length`."""
        model = _load(AutoModelForCausalLM, policy)
        responses = self._sample(model, seed)
        kls, rewards = [], []
        for start in range(0, len(self.prompts), _ROWS):
            part = slice(start, start + _ROWS)
            prompts, written = self.prompts[part], responses[part]
            kls += self._kl(model, prompts, written)
            rewards += self._rewards(prompts, written)
        return {
            **mean_and_error("reward", torch.tensor(rewards)),
            **mean_and_error("kl", torch.tensor(kls)),
            "length": sum(map(len, responses)) / len(responses),
        }

    def _sample(self, model: Any, seed: int) -> list[list[int]]:
        """Responses, the token that ends one included."""
        ids, mask = _padded(self.prompts, self.pad, left=True)
        torch.manual_seed(seed)
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=self.new_tokens,
            eos_token_id=self.end, pad_token_id=self.pad,
        )  # fmt: skip
        with torch.no_grad():
            found = model.generate(ids, attention_mask=mask, generation_config=config)
        return [_until(self.end, row) for row in found[:, ids.shape[1] :].tolist()]

    def _kl(self, model: Any, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        ids, mask = _padded(rows, self.pad)
        found = []
        with torch.no_grad():
            p, q = (
                each(ids, attention_mask=mask).logits.log_softmax(-1)
                for each in (model, self.reference)
            )
            tokens = (p.exp() * (p - q)).sum(-1)  # [rows, T]: of what comes after each token
        for row, prompt, response in zip(tokens, prompts, responses, strict=True):
            first = len(prompt) - 1
            found.append(row[first : first + len(response)].sum().item())
        return found

    def _rewards(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        ids, mask = _padded(rows, self.pad)
        with torch.no_grad():
            hidden = self.reward.base_model(ids, attention_mask=mask).last_hidden_state
            last = hidden[torch.arange(len(rows)), mask.sum(-1) - 1]
            return [float(score) for score in self.reward.score(last).squeeze(-1)]


def _load(kind: Any, folder: str | Path) -> Any:
    with quiet_transformers():
        return kind.from_pretrained(folder, dtype=torch.float32).eval()


def _end_of(folder: str) -> int:
    return int(AutoTokenizer.from_pretrained(folder).eos_token_id)


def _until(end: int, row: list[int]) -> list[int]:
    """A response up to the token that ends it, if there is one."""
    return row[: row.index(end) + 1] if end in row else row


def _padded(rows: list[list[int]], pad: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of those that are not padding, both int64: [rows, longest]."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    before, after = ([gap if left else 0 for gap in gaps], [0 if left else gap for gap in gaps])
    ids = [[pad] * a + row + [pad] * b for a, row, b in zip(before, rows, after, strict=True)]
    mask = [
        [0] * a + [1] * len(row) + [0] * b for a, row, b in zip(before, rows, after, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)

"""A reward model: a frozen sequence classifier with one label, which scores prompt and response."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.models import architecture, loading, precision
from ppo_engine.models.adapter_folder import tokenizer_source
from ppo_engine.models.value_model import read_value_model, ready_value_model, sequence_scores
from ppo_engine.text.encoding import Prompt, encode_dialogue, pad_left
from ppo_engine.text.tokenizer import load_tokenizer, separate_pad_from_eos


class RewardModel:
    """A frozen reward model with its own tokenizer and chat template."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch_size: int = 8,
        max_tokens: int | None = None,
    ) -> None:
        """`max_tokens` of prompt and response together; the model's own limit unless given."""
        separate_pad_from_eos(tokenizer)
        self.model = ready_value_model(model, tokenizer, device).requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.micro_batch_size = micro_batch_size
        self.max_tokens = min(max_tokens or sys.maxsize, architecture.context_length(model))

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        finished: Sequence[bool],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Scores `[B]`, fp32, of text as this model's tokenizer and chat template render it.

        Multi-turn chats (column `turns`, see `rollout.generation`) are rendered turn by turn.
        """
        turns = (columns or {}).get("turns", [None] * len(prompts))
        rows = []
        for prompt, response, ended, said in zip(prompts, responses, finished, turns, strict=True):
            if said and not isinstance(prompt, str):
                prompt, response = [*prompt, *said[:-1]], said[-1]["content"]
            ids = encode_dialogue(self.tokenizer, prompt, response, self.max_tokens, ended)
            rows.append(ids)
        return self._score(rows)

    def score_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores `[B]`, fp32, of token ids `[B, L]`, for a policy with the `same_tokenizer`."""
        ids, real = input_ids.cpu(), attention_mask.bool().cpu()
        rows = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
        return self._score([row[-self.max_tokens :] for row in rows])

    @torch.no_grad()
    def _score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        scores = torch.zeros(len(rows), device=self.device)
        # By length, so that short rows are not padded to the longest of all.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.micro_batch_size):
            picked = order[start : start + self.micro_batch_size]
            ids, mask = pad_left([rows[i] for i in picked], self.tokenizer.pad_token_id)
            with precision.compute(self.device, self.dtype):
                scores[picked] = sequence_scores(
                    self.model,
                    torch.tensor(ids, device=self.device),
                    torch.tensor(mask, device=self.device),
                )
        return scores


def load_reward_model(
    path: str, *, device: torch.device, dtype: torch.dtype, micro_batch_size: int = 8
) -> RewardModel:
    """The reward model at `path`, a folder or name; a UserError where it has no score head."""
    path = loading.resolve(path)
    loading.load_model_config(path)
    tokenizer = load_tokenizer(tokenizer_source(path))
    model = read_value_model(path, require_head=True)
    return RewardModel(
        model, tokenizer, device=device, dtype=dtype, micro_batch_size=micro_batch_size
    )

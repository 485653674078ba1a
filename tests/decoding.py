"""Rows of tokens, and what a sampler writes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rollouts import TOKENIZER

from ppo_engine.models.language_model import LanguageModel
from ppo_engine.pretrained.masters import to_compute_dtype
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.rollout.schedule import Request, Response
from ppo_engine.settings.schema import GenerationConfig

NEW = 24


def policy_of(model: Any, dtype: torch.dtype = torch.float32) -> LanguageModel:
    made = LanguageModel(model, TOKENIZER, device=torch.device("cpu"), dtype=dtype)
    to_compute_dtype(made.model, dtype)
    return made


def some_rows(*lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(1, 250, (n,), generator=random).tolist() for n in lengths]


ROWS = some_rows(5, 20, 12, 3, 1, 20)


def write(
    sampler: Sampler, rows: Sequence[list[int]] = ROWS, new: int = NEW, **settings: Any
) -> list[Response]:
    """What is written behind the rows, with the random numbers of their places among them."""
    greedy = settings.pop("greedy", False)
    requests = [Request([*row], i, i * new) for i, row in enumerate(rows)]
    config = GenerationConfig(max_new_tokens=new, **settings)
    torch.manual_seed(5)
    with sampler.session(config, greedy=greedy) as go_on:
        return go_on(requests)


def tokens(responses: Sequence[Response]) -> list[list[int]]:
    return [response.tokens for response in responses]

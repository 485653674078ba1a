"""A reward model: a frozen sequence classifier with one label, which scores prompt and response."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.errors import UserError
from ppo_engine.models.budget import Budget
from ppo_engine.models.reader import Limit, Reader
from ppo_engine.models.shared_base import SharedBase
from ppo_engine.models.token_rows import scored
from ppo_engine.models.value_model import read_value_model, read_values, ready_value_model
from ppo_engine.pretrained import architecture, loading
from ppo_engine.pretrained.adapters import is_adapted
from ppo_engine.pretrained.masters import to_compute_dtype
from ppo_engine.pretrained.storage import in_fp32
from ppo_engine.text.options import row_options
from ppo_engine.text.prompt import Prompt
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import TemplateError
from ppo_engine.text.tokenizer import separate_pad_from_eos


class RewardModel:
    """A frozen reward model with its own tokenizer and chat template, its weights in the compute
    `dtype` but for the score head, which stays in fp32."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        dtype: torch.dtype,
        budget: Budget | None = None,
        max_tokens: int | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        """`max_tokens` of prompt and response together; the model's own limit unless given. The
        `renderer` is the policy's, with what a run hands to chat templates."""
        separate_pad_from_eos(tokenizer)
        # Adapters stand on a base that is another model's too, and stays as it is.
        own = model if is_adapted(model) else in_fp32(model)
        ready = ready_value_model(own, tokenizer, device)
        self.model = to_compute_dtype(ready.requires_grad_(False), dtype)
        self.tokenizer = tokenizer
        self.renderer = renderer.of(tokenizer) if renderer else Renderer(tokenizer)
        self.device = device
        self.dtype = dtype
        self.budget = budget or Budget(Limit.automatic(self.model))
        self.reader = Reader(self.model)
        self.max_tokens = min(max_tokens or sys.maxsize, architecture.context_length(model))

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        finished: Sequence[bool],
        columns: Mapping[str, Sequence[Any]] | None = None,
        written: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
    ) -> Tensor:
        """Scores `[B]`, fp32, of the conversations as this model's tokenizer and chat template
        render them (`text.renderer.Renderer.scored`).

        Those of several turns come in the column `turns`, see `rollout.generation`; `written` are
        the tokens of prompts and responses, where a policy with the `same_tokenizer` wrote them.
        """
        columns = columns or {}
        rows = []
        for row, (prompt, response, ended) in enumerate(
            zip(prompts, responses, finished, strict=True)
        ):
            turns = columns["turns"][row] if "turns" in columns else None
            try:
                ids = self.renderer.scored(
                    prompt,
                    turns if turns and not isinstance(prompt, str) else response,
                    finished=ended,
                    max_tokens=self.max_tokens,
                    options=row_options(columns, row),
                    written=None if written is None else written[row],
                )
            except TemplateError as error:
                raise UserError(f"The reward model cannot read a conversation: {error}.") from error
            rows.append(ids)
        return self._score(rows)

    def check_prompt(self, prompt: Prompt, options: Mapping[str, Any]) -> None:
        """Raises a `TemplateError` for a prompt that this model's chat template cannot render."""
        self.renderer.scored(prompt, "Yes.", options=options, max_tokens=sys.maxsize)

    def _score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Equal rows are read once: in two batches of different shape they would get scores that
        differ by rounding, which a group's advantages would take for a difference."""
        different = list(dict.fromkeys(map(tuple, rows)))
        places = {row: place for place, row in enumerate(different)}
        return self._score_each(different)[[places[tuple(row)] for row in rows]]

    @torch.no_grad()
    def _score_each(self, rows: Sequence[Sequence[int]]) -> Tensor:
        texts = [scored(row) for row in rows]

        def score(passes: list[list[int]]) -> Tensor:
            scores = torch.zeros(len(rows), dtype=torch.float32, device=self.device)
            for planned in passes:
                part = self.reader.stack([texts[i] for i in planned])
                scores[planned] = read_values(self.model, self.reader, part)
            return scores

        with self.reader.on_device():
            return self.budget.run([len(row) for row in rows], score, packed=self.reader.packs)


def load_reward_model(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    budget: Budget | None = None,
    renderer: Renderer | None = None,
    base: SharedBase | None = None,
    trust: bool = False,
) -> RewardModel:
    """The reward model at `path`, a folder or name; a UserError where it has no score head. With a
    `base`, it is the adapters there on that; with `trust`, by code that comes with it."""
    tokenizer = loading.tokenizer_at(path, trust=trust)
    options = {"dtype": torch.float32, "trust_remote_code": trust}
    if base is not None:
        model = base.reward_model(path, trust=trust)
    else:
        model = read_value_model(path, require_head=True, options=options)
    return RewardModel(
        model,
        tokenizer,
        device=device,
        dtype=dtype,
        budget=budget,
        renderer=renderer,
    )

"""What the policy wrote: the batch of a step.

Prompts are padded on the left and responses on the right, so that every response starts at the
same column. Response tokens are the unit of work: prompts get no log-probs, values or loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppo_engine.models.token_rows import Row, predicting
from ppo_engine.text.prompt import Message, Prompt


@dataclass(frozen=True)
class Rollout:
    """Responses sampled from the policy. B responses, prompts of at most P tokens, T new tokens.

    In a multi-turn conversation a response includes the environment's answers, whose tokens the
    policy reads but does not learn from.
    """

    prompt_ids: Tensor  # [B, P] long, padded on the left
    prompt_mask: Tensor  # [B, P] bool, True is a real token
    response_ids: Tensor  # [B, T] long, padded on the right
    mask: Tensor  # [B, T] bool, True is a token that the policy wrote, its EOS included
    finished: Tensor  # [B] bool, the response ended by itself, at an end or a stop: not truncated
    prompts: Sequence[Prompt]  # as given
    responses: Sequence[str]  # decoded, without end and padding; of all turns
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # for reward functions
    environment_mask: Tensor | None = None  # [B, T] bool, True is a token of the environment's
    logprobs: Tensor | None = None  # [B, T] fp32, of the sampler; None where it is not ours
    greedy: Rollout | None = None  # greedy responses to each distinct prompt, for ReMax

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response that the policy wrote, [B] long."""
        return self.mask.sum(1)

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool, True is a real token, whoever wrote it."""
        return self.mask if self.environment_mask is None else self.mask | self.environment_mask

    @property
    def turns(self) -> Sequence[list[Message]] | None:
        """The messages of each conversation after its prompt, where an environment's are known."""
        return None if self.environment_mask is None else self.columns.get("turns")

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Prompt and response joined: ids [B, P+T] long and attention mask [B, P+T] bool."""
        return (
            torch.cat((self.prompt_ids, self.response_ids), 1),
            torch.cat((self.prompt_mask, self.response_mask), 1),
        )

    @cached_property
    def written(self) -> list[tuple[list[int], list[int]]]:
        """The token ids of each prompt and of the response to it, without padding."""
        parts = [
            [ids[real].tolist() for ids, real in zip(x.cpu(), mask.cpu(), strict=True)]
            for x, mask in (
                (self.prompt_ids, self.prompt_mask),
                (self.response_ids, self.response_mask),
            )
        ]
        return list(zip(*parts, strict=True))

    @cached_property
    def rows(self) -> list[Row]:
        """Prompts and responses as a language model reads them to predict the policy's tokens."""
        found = []
        for (prompt, response), own in zip(self.written, self._own, strict=True):
            trained = [False] * (len(prompt) + len(response))
            for place in own:
                trained[len(prompt) + place] = True
            found.append(predicting(prompt + response, trained))
        return found

    def places(self, numbers: Sequence[int]) -> Tensor:
        """Where the policy's tokens of these responses stand in [B, T] flattened: `[tokens]`,
        response by response."""
        width = self.mask.shape[1]
        found = [number * width + place for number in numbers for place in self._places[number]]
        return torch.tensor(found, dtype=torch.long, device=self.mask.device)

    @cached_property
    def _places(self) -> list[list[int]]:
        """Of the policy's tokens of each response, on the host."""
        return [own.nonzero()[:, 0].tolist() for own in self.mask.cpu()]

    @cached_property
    def _own(self) -> list[list[int]]:
        """Which of each response's real tokens, counted without padding, the policy wrote."""
        real, own = self.response_mask.cpu(), self.mask.cpu()
        return [x[kept].nonzero()[:, 0].tolist() for x, kept in zip(own, real, strict=True)]

    def select(self, rows: Tensor) -> Rollout:
        """The given rows, without the padding columns that none of them needs; `greedy`, which
        belongs to the whole batch, is dropped."""
        prompt = self.prompt_mask[rows].sum(1).max()
        start = self.prompt_ids.shape[1] - int(prompt)
        stop = int(self.response_mask[rows].sum(1).max())
        picked = rows.tolist()

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows, :stop]

        return Rollout(
            prompt_ids=self.prompt_ids[rows, start:],
            prompt_mask=self.prompt_mask[rows, start:],
            response_ids=self.response_ids[rows, :stop],
            mask=self.mask[rows, :stop],
            finished=self.finished[rows],
            prompts=[self.prompts[i] for i in picked],
            responses=[self.responses[i] for i in picked],
            columns={name: [column[i] for i in picked] for name, column in self.columns.items()},
            environment_mask=cut(self.environment_mask),
            logprobs=cut(self.logprobs),
        )

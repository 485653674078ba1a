"""An HTTP endpoint as a reward: one POST request with JSON for a batch of responses.

Request, every list as long as the batch:

    {"prompts": [...], "responses": [...], "finished": [...], "columns": {"name": [...], ...}}

Prompts are text, or lists of chat messages; `finished` says whether a response ended by itself, not
truncated; `columns` are the other columns of the data. Answer, with one finite number for each
response:

    {"scores": [...]}          or {"rewards": [...]}, or the bare list
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.rewards.endpoint import Endpoint
from ppo_engine.rewards.function import checked_scores
from ppo_engine.settings.schema import RewardEndpointConfig
from ppo_engine.text.prompt import Prompt
from ppo_engine.user_functions.awaiting import awaited


class HTTPReward:
    """Scores from a server (`endpoint` says how it is asked), each of which it gave itself."""

    def __init__(self, url: str, settings: RewardEndpointConfig) -> None:
        self._endpoint = Endpoint(url, settings)
        self.settings = settings
        self.host = self._endpoint.host

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        finished: Sequence[bool],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Scores `[B]`, fp32, on the CPU; a UserError where the endpoint fails or misbehaves."""
        size = self.settings.batch_size or max(len(responses), 1)
        parts = [slice(start, start + size) for start in range(0, len(responses), size)]
        requests = [
            {
                "prompts": list(prompts[part]),
                "responses": list(responses[part]),
                "finished": list(finished[part]),
                "columns": {name: list(column[part]) for name, column in columns.items()},
            }
            for part in parts
        ]
        return awaited(self._scores([self._body(request) for request in requests], responses, size))

    def _body(self, request: Mapping[str, Any]) -> str:
        try:
            return json.dumps(request, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{self._endpoint.shown} cannot be called: the prompts or their columns are not "
                f"valid JSON ({error}). Give text, finite numbers, lists and dictionaries of them."
            ) from error

    async def _scores(self, bodies: Sequence[str], responses: Sequence[str], size: int) -> Tensor:
        """`size` of them by each request."""
        scores = [torch.zeros(0, dtype=torch.float32)]
        async with self._endpoint.client() as client:
            for first, body in zip(range(0, len(responses), size), bodies, strict=True):
                reply = await self._endpoint.post(client, body)
                scores.append(self._checked(reply, responses[first : first + size], first))
        return torch.cat(scores)

    def _checked(self, reply: bytes, responses: Sequence[str], first: int) -> Tensor:
        """Of one reply; its `responses` are from number `first` of the batch on."""
        source = self._endpoint.shown
        try:
            answer = json.loads(reply, object_pairs_hook=_no_key_twice)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{source} answered 200, but not with valid JSON ({error})"
                f'{self._endpoint.first_line(reply)}. It must answer {{"scores": [...]}}.'
            ) from error
        if isinstance(answer, dict):
            answer = answer.get("scores", answer.get("rewards", answer))
        for index, score in enumerate(answer if isinstance(answer, list) else (), first):
            if isinstance(score, bool):
                raise UserError(
                    f"{source} returned {shown(score)} for response {index} (counted from 0); "
                    "every score must be a number: 1 or 0."
                )
        return checked_scores(answer, responses, source, first)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON leaves open which of two values counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found

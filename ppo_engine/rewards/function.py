"""A Python function as a reward, and the checks of the scores that it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.text.encoding import Prompt
from ppo_engine.user_functions import UserFunction


class RewardFunction(UserFunction):
    """A user's `(prompts, responses, **columns) -> list[float]`, sync or async, its result checked.

    `prompts` are as the data has them: text, or lists of chat messages.
    """

    kind = "reward function"

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        finished: Sequence[bool],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Scores `[B]`, fp32, on the CPU; a UserError where the function fails or misbehaves."""
        return checked_scores(self.call(prompts, responses, columns), len(responses), str(self))


def checked_scores(result: Any, count: int, source: str) -> Tensor:
    """`result` as `count` finite scores, fp32; a UserError that begins with `source` otherwise."""
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise UserError(
            f"{source} returned {shown(result)}; it must return a list of {count} numbers, one "
            "for each response."
        )
    if len(values) != count:
        raise UserError(
            f"{source} returned {len(values)} scores for {count} responses; it must return one for "
            "each."
        )
    return torch.tensor([_number(value, i, source) for i, value in enumerate(values)])


def _number(value: Any, index: int, source: str) -> float:
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # torch, numpy
    valid = isinstance(number, int | float) and math.isfinite(number)
    if not valid or abs(number) > torch.finfo(torch.float32).max:
        raise UserError(
            f"{source} returned {shown(value)} for response {index} (counted from 0); every score "
            "must be a finite number."
        )
    return float(number)

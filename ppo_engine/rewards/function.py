"""A Python function as a reward, and the checks of the scores that it returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_engine.errors import UserError
from ppo_engine.messages import counted, shortened, shown
from ppo_engine.text.prompt import Message, Prompt
from ppo_engine.user_functions.function import UserFunction
from ppo_engine.user_functions.signature import Lists

# What functions for TRL call what the policy wrote; its documentation has both of the latter.
_TRL = ("completions", "completion_ids", "completions_ids")
_NAMES = ("prompts", "responses", "finished", *_TRL)


class RewardFunction(UserFunction):
    """A user's `(prompts, responses, **columns) -> list[float]`, sync or async, its result checked.

    It is given what it names, as lists with an item for each response: `prompts` as the data has
    them (text, or lists of chat messages), `responses` (text), `finished` (whether each ended with
    EOS), `turns` where there is an environment (see `rollout.environment`), the data's columns; and
    what functions for TRL name: `completions` (after a text prompt text, in a chat the messages
    after its prompt, `[{"role": "assistant", "content": …}]`) and `completion_ids` (token ids).
    """

    kind = "reward function"
    lists = Lists("prompts", "responses", ("responses", *_TRL, "turns"), "reward.arguments")

    def check_columns(self, columns: Collection[str], *, several_turns: bool) -> None:
        """A UserError where the function cannot be called on data with these `columns`."""
        self.check((*_NAMES, "turns") if several_turns else _NAMES, columns)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        finished: Sequence[bool],
        columns: Mapping[str, Sequence[Any]],
        *,
        turns: Sequence[list[Message]] | None = None,
        token_ids: Sequence[list[int]] | None = None,
    ) -> Tensor:
        """Scores `[B]`, fp32, on the CPU; a UserError where the function fails or misbehaves.

        `turns` of several, and the responses' `token_ids`, where they are known.
        """
        said = turns or [[{"role": "assistant", "content": response}] for response in responses]
        completions = [
            response if isinstance(prompt, str) else messages
            for prompt, response, messages in zip(prompts, responses, said, strict=True)
        ]
        told: dict[str, Any] = {
            "prompts": prompts,
            "responses": responses,
            "completions": completions,
            "finished": finished,
        }
        if token_ids is not None:
            told |= dict.fromkeys(_TRL[1:], token_ids)
        if turns is not None:
            told["turns"] = turns
            columns = {name: column for name, column in columns.items() if name != "turns"}
        return checked_scores(self.call(told, columns), responses, str(self))


def checked_scores(result: Any, responses: Sequence[str], source: str, first: int = 0) -> Tensor:
    """`result` as a finite score for each response, fp32; a UserError that begins with `source`
    otherwise. The first response is number `first` of its batch."""
    values = _read(result, "tolist", source)
    if not isinstance(values, list | tuple):
        raise UserError(
            f"{source} returned {shown(result)}; it must return a list of {len(responses)} "
            "numbers, one for each response."
        )
    if len(values) != len(responses):
        raise UserError(
            f"{source} returned {counted(len(values), 'score')} for "
            f"{counted(len(responses), 'response')}; it must return one for each."
        )
    return torch.tensor(
        [
            _number(value, f"response {index} (counted from 0), {shortened(response)}", source)
            for index, (value, response) in enumerate(zip(values, responses, strict=True), first)
        ],
        dtype=torch.float32,
    )


def _number(value: Any, place: str, source: str) -> float:
    number = _read(value, "item", source) if getattr(value, "ndim", None) == 0 else value
    if number is None:
        raise UserError(
            f"{source} returned {shown(value)} for {place}: where a reward does not apply return "
            "0, which leaves the sum of several as it is."
        )
    # Before any conversion, which an int may be too large for. NaN is not within the bounds.
    largest = torch.finfo(torch.float32).max
    if not (isinstance(number, int | float) and -largest <= number <= largest):
        raise UserError(
            f"{source} returned {shown(value)} for {place}; every score must be a finite number, "
            f"an int or a float of at most {largest:.1e}."
        )
    return float(number)


def _read(value: Any, method: str, source: str) -> Any:
    """A tensor's or an array's numbers, of torch, numpy and the like; all else as it is."""
    try:
        return getattr(value, method)() if hasattr(value, method) else value
    except Exception as error:  # a tensor without data, an object that only looks like one
        raise UserError(
            f"{source} returned {shown(value)}, whose numbers cannot be read: {error}"
        ) from error

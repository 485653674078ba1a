"""Arguments from settings for a reward function: `reward.arguments`, by the parameters' names.

Without torch: the command line finds mistakes here at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import did_you_mean
from ppo_engine.rewards.ready import ready_function


def bound(
    function: Callable[..., Any], arguments: Mapping[str, Any], name: str
) -> Callable[..., Any]:
    """`function` with `arguments` filled in; a UserError for one that it does not take."""
    if not arguments:
        return function
    parameters = _parameters(function)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for argument in arguments:
            if argument not in known:
                raise UserError(
                    f"The reward function {name!r} has no parameter {argument!r}, which "
                    f"reward.arguments sets.{did_you_mean(argument, known)} Its "
                    f"parameters are {', '.join(known) or 'none'}."
                )
    return functools.partial(function, **arguments)


def ready_reward(name: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The ready function `name` with its `arguments`, those left out at their defaults: a column of
    such a name is none of them. A UserError where one is missing or wrong."""
    function = ready_function(name)
    settable = [p for p in _parameters(function) if p.kind is p.KEYWORD_ONLY]
    columns = [p for p in _parameters(function) if p.kind is not p.KEYWORD_ONLY]
    for wrong in {p.name for p in columns} & {*arguments}:
        raise UserError(
            f"The reward function {name!r} takes {wrong!r} from the "
            f"{'policy' if wrong == 'responses' else 'data'}: leave it out of reward.arguments."
        )
    for p in settable:
        if p.default is p.empty and p.name not in arguments:
            raise UserError(
                f"The reward function {name!r} needs an argument: set reward.arguments.{p.name}=…"
            )
    defaults = {p.name: p.default for p in settable if p.default is not p.empty}
    reward = bound(function, {**defaults, **arguments}, name)
    reward(*([] for _ in columns))  # it checks its arguments and packages ahead of the responses
    return reward


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    """None where they cannot be seen, as of some built-in functions."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []

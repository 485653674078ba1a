"""Whether a response has a form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.rewards.ready.time_limit import time_limit


def format_match(responses: Sequence[str], *, pattern: str) -> list[float]:
    """1.0 where the regular expression `pattern` matches the whole response; `.` matches line ends
    too.

    0.0 where that takes more than a second, as patterns with a repetition in a repetition may,
    (a+)+; the alarm that sees to it works in the main thread only.
    """
    if not isinstance(pattern, str):
        raise UserError(
            f"format_match: pattern must be text, but is {shown(pattern)}. On the command line, "
            "quote what YAML takes for something else: reward.arguments.pattern='\"[0-9]+\"'"
        )
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            f"format_match: pattern is not a valid regular expression: {error}, in {pattern!r}."
        ) from error
    return [float(_matches(compiled, response)) for response in responses]


def _matches(pattern: re.Pattern[str], response: str) -> bool:
    try:
        with time_limit():
            return pattern.fullmatch(response) is not None
    except TimeoutError:
        return False

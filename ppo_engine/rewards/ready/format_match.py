"""Whether a response has a form."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ppo_engine.errors import UserError
from ppo_engine.messages import shown

_LONGEST = 1.0  # seconds for a response


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
        with _time_limit(_LONGEST):
            return pattern.fullmatch(response) is not None
    except TimeoutError:
        return False


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer; no limit outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""The one exception that means "the user can fix this": the CLI prints its text, no traceback."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

DEBUG_VARIABLE = "PPO_ENGINE_DEBUG"  # set: tracebacks in full

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class UserError(Exception):
    """Wrong input, configuration or environment; the message says what, where, and what to do."""


class MachineError(UserError):
    """What no setting helps with, such as a full disk: the CLI's exit status is 1, not 2."""


class Stopped(SystemExit):
    """By the signal of this `number`, SIGTERM or SIGHUP; where nobody catches it, the process ends
    with 128 + number, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def entry_point(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that people call from Python: the traceback of a `UserError` ends there, without
    what lies below and without the exception behind it, which the message tells."""

    @functools.wraps(call)
    def entered(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return call(*args, **kwargs)
        except UserError as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            raise error.with_traceback(None) from None

    return entered

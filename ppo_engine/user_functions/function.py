"""A user's function, given as an object or by name, sync or async; errors say where they are."""

from __future__ import annotations

import asyncio
import functools
import inspect
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from ppo_engine.errors import Stopped, UserError
from ppo_engine.user_functions.awaiting import awaited
from ppo_engine.user_functions.signature import Lists, Signature


class UserFunction:
    """A function of a batch's lists and of the data columns, as its signature names them.

    With `**columns` it gets all columns. An `async` function is awaited once, for the whole batch.
    """

    kind: ClassVar[str]
    lists: ClassVar[Lists]

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or function_name(function)
        if inspect.isclass(function):
            raise UserError(f"{self} is a class: give an object of it, or a function.")
        self._signature = Signature(function, self.lists, str(self))
        self._columns: set[str] = set()

    def __str__(self) -> str:
        return f"The {self.kind} {self.name!r}"

    def accepts(self, column: str) -> bool:
        """Whether the function gets a column of that name."""
        return self._signature.accepts(column)

    def check(self, offered: Collection[str], columns: Collection[str]) -> None:
        """A UserError where the function cannot be called with the batch's lists `offered` and the
        data's `columns`, which are kept: rows of a batch that all lack one have None there."""
        self._signature.arguments(offered, columns)
        self._columns |= {*columns}

    def call(self, lists: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> Any:
        """What the function returns; a UserError that says where, if it fails."""
        size = len(lists[self.lists.first])
        absent = {name: [None] * size for name in sorted(self._columns - {*columns})}
        columns = {**columns, **absent}
        arguments = self._signature.arguments(lists, columns)
        told = {**columns, **lists}
        positional = [_copied(told[name]) for name in arguments.positional]
        by_name = {key: _copied(told[name]) for key, name in arguments.by_name.items()}
        try:
            result = self.function(*positional, **by_name)
            return awaited(result) if inspect.isawaitable(result) else result
        except UserError as error:  # it says what to do
            raise UserError(f"{self}: {error}") from error
        except Stopped:  # by a signal, which came while the function ran
            raise
        # The latter two are no Exceptions, but end neither a run nor its process.
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise UserError(
                f"{self} failed{_origin(error, self.function)}: {type(error).__name__}: {error}"
            ) from error


def _copied(items: Sequence[Any]) -> list[Any]:
    """Messages and the like anew for each row: what a function appends to them (judges do that to a
    prompt) stays its own."""

    def anew(value: Any) -> Any:
        if type(value) is dict:
            return {key: anew(item) for key, item in value.items()}
        return [anew(item) for item in value] if type(value) is list else value

    return [anew(item) for item in items]


def function_name(function: Callable[..., Any]) -> str:
    function = _without_arguments(function)
    return str(getattr(function, "__name__", type(function).__name__))


def _without_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a partial."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _origin(error: BaseException, function: Callable[..., Any]) -> str:
    """Where it failed: the innermost line of the function's own file, if it got that far."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call above
    if not frames:
        return ""
    code = getattr(_without_arguments(function), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    return f" at {frame.filename}, line {frame.lineno}"

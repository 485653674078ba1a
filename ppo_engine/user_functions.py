"""User functions: given by name or as objects, sync or async; errors say where they are."""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import shown


class UserFunction:
    """A function of two lists and of the data columns that its signature names.

    With `**columns` it gets all of them. An `async` function is awaited once, for the whole
    batch.
    """

    kind = "function"

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self._columns = _ColumnParameters(function)

    def __str__(self) -> str:
        return f"The {self.kind} {self.name!r}"

    def accepts(self, column: str) -> bool:
        """Whether the function gets a column of that name."""
        return self._columns.accept(column)

    def call(
        self, first: Sequence[Any], second: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> Any:
        """What the function returns; a UserError that says where, if it fails."""
        absent = [name for name in self._columns.required if name not in columns]
        if absent:
            raise UserError(
                f"{self} asks for {_quoted(absent)}, but the prompts have "
                f"{_quoted(columns) if columns else 'no other columns'}. Add the column, or give "
                "the parameter a default."
            )
        passed = {k: list(v) for k, v in columns.items() if self.accepts(k)}
        try:
            result = self.function(list(first), list(second), **passed)
            return _awaited(result) if inspect.isawaitable(result) else result
        except Exception as error:
            raise UserError(
                f"{self} failed{_origin(error, self.function)}: {type(error).__name__}: {error}"
            ) from error


def import_function(spec: str) -> Callable[..., Any]:
    """The function that "file.py:name" or "package.module:name" names, or a UserError."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise UserError(f"{spec!r} names no function: write file.py:name or module:name.")
    module = _import_file(source) if source.endswith(".py") else _import_module(source)
    found = getattr(module, name, None)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value)]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{source} has no function {name!r}.{hint}")
    if not callable(found):
        raise UserError(f"{name!r} in {source} is not a function, but {shown(found)}.")
    return found


def _import_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"The function's file {source!r} does not exist.")
    return _run_file(path, path.stat().st_mtime_ns, source)


@functools.cache
def _run_file(path: Path, changed: int, source: str) -> ModuleType:
    """Once for all functions of a file, which may load a judge; again if it has `changed`."""
    name = f"_user_file_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"{source!r} could not be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def _import_module(source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise UserError(
            f"The module {source!r} could not be imported: {type(error).__name__}: {error}. Is it "
            "installed? A file is named by its path, ending in .py."
        ) from error


def _awaited(result: Awaitable[Any]) -> Any:
    """The result of an async function, also where this thread runs an event loop (notebooks)."""

    async def wait() -> Any:
        return await result

    future = asyncio.run_coroutine_threadsafe(wait(), _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C ended the wait
        raise


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all async functions and batches: clients, locks and semaphores that a
    file creates once belong to the loop that used them first."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async functions", daemon=True).start()
    return loop


class _ColumnParameters:
    """Which columns of the data a function's signature takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # some built-in functions have no signature
            parameters = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        # The two lists, whatever the function calls them.
        self._taken = [p.name for p in parameters if p.kind in positional][:2]
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        rest = [
            p for p in parameters
            if p.name not in self._taken and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]  # fmt: skip
        self._named = {p.name for p in rest}
        self.required = [p.name for p in rest if p.default is p.empty]

    def accept(self, column: str) -> bool:
        return column in self._named or (self._takes_all and column not in self._taken)


def _origin(error: Exception, function: Callable[..., Any]) -> str:
    """Where it failed: the innermost line of the function's own file, if it got that far."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call above
    if not frames:
        return ""
    code = getattr(function, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    return f" at {frame.filename}, line {frame.lineno}"


def _quoted(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names)

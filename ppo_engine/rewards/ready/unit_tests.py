"""Whether the program in a response passes its tests."""

from __future__ import annotations

import ast
import functools
import math
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.rewards.ready.program import passes


def unit_tests(
    responses: Sequence[str],
    tests: Sequence[Any],
    *,
    timeout: float = 10.0,
    memory: int = 1024,
) -> list[float]:
    """1.0 where the Python program in the response passes all of its `tests`.

    The program is the response's last ```python block, or else all of it (`program_in`). `tests`
    are statements that raise where it is wrong, such as `assert add(1, 2) == 3`: a text, or a list
    of texts. They run after the program, in its namespace; their functions named `test…` are
    called, those of classes are not. Each program has a process of its own, as many at a time as
    there are cores, which may take `timeout` seconds and `memory` MiB. **These limits stop
    accidents; they are no sandbox against malicious code**: see `program`.
    """
    for name, value in (("timeout", timeout), ("memory", memory)):
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"unit_tests: {name} must be a number above 0, but is {shown(value)}.")
    if not responses:  # a run's check of its settings
        _check_limits(timeout, memory)
    todo = list(zip(map(program_in, responses), map(_texts, tests), strict=True))
    stop = threading.Event()
    run = functools.partial(_score, timeout=timeout, memory=int(memory * 2**20), stop=stop)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "unit tests") as executor:
        try:
            return list(executor.map(run, todo))
        finally:  # such as a signal, for which no program is waited for
            stop.set()


@functools.cache  # settings are checked more than once
def _check_limits(timeout: float, memory: float) -> None:
    """A UserError where not even a program that does next to nothing stays within the limits."""
    # An empty one may live on what the interpreter has left; any other asks for more.
    if not passes("", ["bytearray(1 << 20)"], timeout=timeout, memory=int(memory * 2**20)):
        raise UserError(
            f"unit_tests: no program ends within timeout={timeout:g} seconds and "
            f"memory={memory:g} MiB, not even one that needs 1 MiB, so that all would score 0: "
            "raise reward.arguments.timeout or reward.arguments.memory (10 and 1024 where they are "
            "not set)."
        )


def program_in(response: str) -> str:
    """The last ```python block of `response`, else the last block without a language, else all."""
    named, bare = [], []
    language, indent, block = "", "", None
    for line in response.split("\n"):
        fence = line.strip()
        if block is None:
            if fence.startswith("```"):
                language, block = fence[3:].strip().lower(), list[str]()
                indent = line[: line.index("`")]  # of a block in a list
        elif fence != "```":
            block.append(line.removeprefix(indent))
        else:
            if language in ("python", "python3", "py"):
                named.append("\n".join(block))
            elif not language:
                bare.append("\n".join(block))
            block = None
    return (named or bare or [response])[-1]


def _texts(tests: Any) -> list[str]:
    """The tests of a row, of which Python can read each; none where there are none."""
    texts = [tests] if isinstance(tests, str) else [] if tests is None else tests
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"tests must be text or a list of texts, but are {shown(tests)}.")
    for text in texts:
        try:
            with warnings.catch_warnings(action="ignore"):  # what they look like is their owner's
                compile(text, "tests", "exec")
        except (SyntaxError, ValueError) as error:
            raise UserError(
                f"the tests {shown(text)} are not valid Python: {error}. Correct them, or leave "
                "their row out."
            ) from error
    texts = [text for text in texts if text.strip()]
    if texts and not any(map(_checks, texts)):
        raise UserError(
            f"the tests {shown(tests)} check nothing: they only define what nobody calls. Add "
            "calls, such as check(add), assertions, or functions named test…; the methods of "
            "classes (unittest) are not called."
        )
    return texts


def _checks(text: str) -> bool:
    """Whether something in a text runs that a wrong program can fail: more than definitions."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("test"):
                return True
        elif isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign):
            if any(isinstance(part, ast.Call | ast.Await) for part in ast.walk(node)):
                return True
        elif not isinstance(node, ast.ClassDef | ast.Import | ast.ImportFrom | ast.Pass):
            return True
    return False


def _score(
    todo: tuple[str, list[str]], *, timeout: float, memory: int, stop: threading.Event
) -> float:
    program, tests = todo
    # Without a program no process: a check of the tests alone is to be cheap.
    there = bool(tests) and bool(program.strip())
    return float(there and passes(program, tests, timeout=timeout, memory=memory, stop=stop))

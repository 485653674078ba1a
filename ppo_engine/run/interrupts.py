"""Ctrl-C, SIGTERM and SIGHUP in training: they end it as exceptions do, after which the last
finished step can be saved; but not while weights change, as half an update is neither the step
before it nor the one after. It is finished where that is soon, and else given up: whoever sends a
signal often kills what has not ended within seconds."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ppo_engine.errors import Stopped

Handler = Callable[[int, FrameType | None], None]

# Seconds; `docker stop` kills after 10, Slurm and Kubernetes after 30, and a checkpoint is written
# in what is left of them.
_PATIENCE = 10.0


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Stopped`, where nobody else handles or ignores them (as
    nohup does). Only in the main thread, which alone gets signals."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            _handle(number, handler)


@contextmanager
def interrupted_after(remaining: Callable[[], float | None]) -> Iterator[None]:
    """Where the block has begun to change weights, and will end within 10 of the seconds that are
    `remaining`, it is finished before a signal within it is raised; a second one is raised at once.
    Before it has begun, None remain. Only of signals that would be raised outside it."""
    ours: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            for handler in (signal.default_int_handler, _stop):
                if signal.getsignal(signum) is handler:
                    ours[signum] = handler
    asked = 0

    def wait(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        restore()
        seconds = remaining()
        if seconds is None or seconds > _PATIENCE:
            ours[number](number, frame)  # raises
        asked = number
        _leave_terminal(number)
        text = f"\n{name_of(number)}: this step is finished first; once more ends it at once\n"
        with suppress(OSError):  # Ctrl-C has ended whoever read it, too
            os.write(2, text.encode())

    def restore() -> None:
        for signum, handler in ours.items():
            _handle(signum, handler)

    for number in ours:
        signal.signal(number, wait)
    try:
        yield
    finally:
        restore()
    if asked:
        ours[asked](asked, None)


def name_of(number: int) -> str:
    """In the words of who sent it."""
    return "interrupted" if number == signal.SIGINT else signal.Signals(number).name


def _stop(number: int, frame: FrameType | None) -> None:
    _leave_terminal(number)
    raise Stopped(number)


def _handle(number: int, handler: Any) -> None:
    """Sets the handler, but not of a SIGHUP that has come: see `_leave_terminal`."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


def _leave_terminal(number: int) -> None:
    """After SIGHUP it is gone, and whatever is printed there would fail. As both the shell and the
    kernel may send one, all that follow are ignored: they ask for nothing new."""
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)

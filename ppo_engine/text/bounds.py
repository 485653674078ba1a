"""Bounds of time and memory for a chat template, which is a program that came with a model."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

try:
    import resource
except ImportError:  # on Windows, where nothing bounds memory
    resource = None  # type: ignore[assignment]

SECONDS = 5.0
MEMORY = 256 << 20  # bytes beyond those that the process has already
CHARACTERS = 16 << 20  # of a rendered conversation: beyond any model's context
_SOURCE = 1 << 20  # characters of a template


class UnboundedError(Exception):
    """A template is beyond its bounds; the message goes on after "The chat template"."""


def check_length(source: str) -> None:
    """Raise an UnboundedError for a template that is too long to be read."""
    if len(source) > _SOURCE:
        raise UnboundedError(f"has {len(source):,} characters, more than {_SOURCE:,}")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise an UnboundedError where the block takes longer, or more memory, than a conversation
    ever does. Time is bounded in the main thread, where nobody else has set the alarm; memory on
    Linux."""
    try:
        with _timed(), _short_of_memory():
            yield
    except MemoryError:
        raise UnboundedError(f"takes more than {MEMORY >> 20} MiB of memory") from None


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    ours = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not ours or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise UnboundedError(f"takes more than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _short_of_memory() -> Iterator[None]:
    usage = Path("/proc/self/statm")
    if resource is None or not usage.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(usage.read_text().split()[5]) * resource.getpagesize() + MEMORY
    free = soft == resource.RLIM_INFINITY and hard == resource.RLIM_INFINITY
    if not free and limit >= min(x for x in (soft, hard) if x != resource.RLIM_INFINITY):
        yield  # a limit of others is as low
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

"""Results of async functions, waited for in the thread that asks."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def awaited(result: Awaitable[Any]) -> Any:
    """The result of an async function, run in this thread: `signal.alarm`, by which verifiers stop
    what takes too long, works in the main thread only.

    Where this thread runs an event loop already, as in notebooks, another thread runs it. Ctrl-C
    cancels the function.
    """
    task: asyncio.Task[Any] | None = None

    async def wait() -> Any:
        nonlocal task
        task = asyncio.current_task()
        return await result

    runner = _runner()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return runner.run(wait())
    with ThreadPoolExecutor(1, "async functions") as executor:
        future = executor.submit(runner.run, wait())
        try:
            return future.result()
        except BaseException:
            if task is not None and not future.done():  # Ctrl-C ended the wait
                runner.get_loop().call_soon_threadsafe(task.cancel)
            raise


@functools.cache
def _runner() -> asyncio.Runner:
    """One event loop for all async functions and batches: clients, locks and semaphores that a
    file creates once belong to the loop that used them first."""
    return asyncio.Runner(loop_factory=asyncio.new_event_loop)

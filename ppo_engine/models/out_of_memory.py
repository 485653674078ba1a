"""An attempt that runs out of memory, and gives back all that it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ppo_engine.memory import give_back_freed_memory, is_out_of_memory
from ppo_engine.messages import first_line
from ppo_engine.models.work import needed

Result = TypeVar("Result")


class MemoryRanOut(Exception):
    """What is left of such an error: its first line."""


def freeing(attempt: Callable[..., Result], *given: Any) -> Result:
    """What `attempt` gives. Where memory runs out in it, all that it made is freed, and
    `MemoryRanOut` raised."""
    try:
        with needed():
            return attempt(*given)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error) or type(error).__name__
    # Only here is the error gone, whose traceback holds all that the attempt had.
    give_back_freed_memory()
    raise MemoryRanOut(reason)

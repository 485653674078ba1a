"""Ready reward functions, each in a file of its name, plain functions to use or to copy.

They are called as users' own are (`docs/rewards.md`): `responses`, a column of the data, and
arguments by keyword. A score is 1.0 or 0.0, without credit for a part; a response that was cut off
is judged as it stands; a row without the column (None) scores 0.0. What is wrong with arguments or
packages they say when called with no responses at all, which is how a run checks them; what is
wrong with a row, those in `REFUSING`, when called with an empty response.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# Here rather than in the files: the command line lists them without importing these.
READY = (
    "exact_match",
    "last_number",
    "boxed",
    "math_equal",
    "format_match",
    "json_schema",
    "unit_tests",
)
# Those that refuse some rows of the data, whatever the response: a run asks them ahead.
REFUSING = ("last_number", "unit_tests")


def ready_function(name: str) -> Callable[..., Any]:
    """The function of that name; one of `READY`."""
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"ppo_engine.rewards.ready.{name}"), name
    )
    return found

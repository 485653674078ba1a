"""Rewards: what scores a response, and what becomes of the scores.

Ready reward functions can be had from here, `from ppo_engine.rewards import exact_match`, or by
their names wherever a reward is named; all are in `ready`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppo_engine.rewards.ready import READY, ready_function

if TYPE_CHECKING:
    from ppo_engine.rewards.ready.boxed import boxed
    from ppo_engine.rewards.ready.exact_match import exact_match
    from ppo_engine.rewards.ready.format_match import format_match
    from ppo_engine.rewards.ready.json_schema import json_schema
    from ppo_engine.rewards.ready.last_number import last_number
    from ppo_engine.rewards.ready.math_equal import math_equal
    from ppo_engine.rewards.ready.unit_tests import unit_tests

__all__ = [
    "boxed",
    "exact_match",
    "format_match",
    "json_schema",
    "last_number",
    "math_equal",
    "unit_tests",
]


def __getattr__(name: str) -> Any:
    if name not in READY:
        raise AttributeError(f"module 'ppo_engine.rewards' has no attribute {name!r}")
    return ready_function(name)

"""Whether a response is the answer, to the letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_engine.rewards.ready.answers import as_text


def exact_match(responses: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """1.0 where the whole response is the answer; any run of white space counts as one space, none
    at the ends."""
    return [
        float(expected is not None and response.split() == as_text(expected).split())
        for response, expected in zip(responses, answer, strict=True)
    ]

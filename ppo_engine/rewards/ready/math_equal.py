"""Whether a response's answer equals the right one as mathematics, by the package math-verify."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.rewards.ready.answers import as_text


def math_equal(responses: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """1.0 where math-verify finds the response's answer equal to `answer`: expressions, sets,
    intervals, matrices, in LaTeX or plain.

    It stops itself after 5 seconds at an expression, by an alarm, which Python allows in the main
    thread only. Optional group `math`.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError(
            "math_equal needs the package math-verify: pip install 'ppo-engine[math]'"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it says each time that it stops
    return [
        float(expected is not None and verify(parse(_as_latex(as_text(expected))), parse(response)))
        for response, expected in zip(responses, answer, strict=True)
    ]


def _as_latex(answer: str) -> str:
    r"""An answer such as \frac{1}{2} or x^2, marked as LaTeX: without, it is not read as such."""
    return answer if "$" in answer or r"\boxed" in answer else f"${answer}$"

"""Whether the last number in a response is that of the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.rewards.ready.answers import as_text
from ppo_engine.rewards.ready.numbers import last_number_in


def last_number(
    responses: Sequence[str], answer: Sequence[Any], *, tolerance: float = 1e-6
) -> list[float]:
    r"""1.0 where the last number in the response and that in the answer differ by `tolerance` at
    most.

    1,234.5, -3, 1e3, 10^4, 3/4, 2 1/2, $5 and 50% are numbers, also with a unit behind them (cm^2),
    and as LaTeX writes them: `1{,}234`, `\frac{7}{2}`, `3.2 \times 10^{4}`. Of an answer as in
    GSM8K, whose last line is "#### 42", that is 42. A UserError for an answer without a number.
    """
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise UserError(
            f"last_number: tolerance must be a number of 0 or more, but is {shown(tolerance)}."
        )
    return [
        float(expected is not None and _equal(response, expected, Fraction(tolerance)))
        for response, expected in zip(responses, answer, strict=True)
    ]


def _equal(response: str, answer: Any, tolerance: Fraction) -> bool:
    wanted, found = last_number_in(as_text(answer)), last_number_in(response)
    if wanted is None:
        raise UserError(
            f"the answer {shown(answer)} has no number to compare with. Correct it, leave its row "
            "out, or compare text with exact_match."
        )
    return found is not None and found.equals(wanted, tolerance)

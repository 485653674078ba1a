r"""Whether what a response ends on, in \boxed{…}, is the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ppo_engine.rewards.ready.answers import as_text
from ppo_engine.rewards.ready.numbers import Number, number

# LaTeX that changes how an answer looks, not what it is: sizes, spaces, dollars. A double backslash
# is the end of a matrix's row, and stays.
_LOOKS = re.compile(
    r"(\\\\)|\\(?:left|right|displaystyle|limits|q?quad)(?![A-Za-z])|\\[,;:! ]|\\?\$|~"
)
_FONT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACED = re.compile(r"-?[0-9]{1,3}( [0-9]{3})+(\.[0-9]+)?")  # thousands
_THOUSANDS = re.compile(r"(?<=[0-9]) (?=[0-9])")
_FRACTION = re.compile(r"(-?)\\frac\{(-?)([0-9]+)\}\{(-?)([0-9]+)\}")


def boxed(responses: Sequence[str], answer: Sequence[Any]) -> list[float]:
    r"""1.0 where what stands in the response's last \boxed{…} equals the answer.

    They are compared as text without white space, but what separates two numbers, and without LaTeX
    that only looks (`\left`, `\,`, `\text`, `\dfrac` for `\frac`), numbers also as numbers: 0.5,
    1/2 and `\frac{1}{2}`, 1,234 and `1{,}234`. Of an answer that has a \boxed{…} itself, as
    solutions in MATH do, that is the answer. A box that does not close, as in a response that was
    cut off, scores 0.0.
    """
    return [
        float(expected is not None and _equal(response, as_text(expected)))
        for response, expected in zip(responses, answer, strict=True)
    ]


def _equal(response: str, answer: str) -> bool:
    found = last_box(response)
    if found is None:
        return False
    one, other = _looks_alike(found), _looks_alike(last_box(answer) or answer)
    if _normalised(one) == _normalised(other):
        return True
    value, wanted = _number(one), _number(other)
    return value is not None and wanted is not None and value.equals(wanted, Fraction(0))


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{…} of `text`; None where there is none or it never closes."""
    starts = [found.end() for found in re.finditer(r"\\boxed\s*\{", text)]
    if not starts:
        return None
    rest, depth = text[starts[-1] :], 1
    # A brace behind a backslash is one to be printed, as in \{1, 2\}.
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[: brace.start()]
    return None


def _number(text: str) -> Number | None:
    """The number that all of a text is; 1 000 is one, 1, 234 are two."""
    spaced = " ".join(text.split())
    return number(_THOUSANDS.sub("", spaced) if _SPACED.fullmatch(spaced) else _compact(spaced))


def _compact(text: str) -> str:
    """Without white space, but where it separates two numbers."""
    return re.sub(r"(?<![0-9,]) | (?![0-9])", "", text)


def _looks_alike(text: str) -> str:
    text = _FONT.sub(r"\1", _LOOKS.sub(r"\1", text.replace("\N{MINUS SIGN}", "-")))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\^\s*\{?\\circ\}?|\N{DEGREE SIGN}", "", text)
    return text.strip().removesuffix(".")


def _normalised(text: str) -> str:
    # In a number, so that no space is set behind the comma.
    text = re.sub(r", (?=\S)", ",", _compact(" ".join(text.replace("{,}", ",").split())))
    # Only where it is all: in 2\frac{1}{2} it would become a part of another number.
    fraction = _FRACTION.fullmatch(text)
    if fraction is None:
        return text
    before, above_sign, above, below_sign, below = fraction.groups()
    minus = "-" * (len(before + above_sign + below_sign) % 2)
    return f"{minus}{above}/{below}"

"""Numbers in text, as people and models write them, read exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_MOST_DIGITS = 1000  # of a number, and its largest exponent: 1e999999999 would fill the memory
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    # A sign after a digit or a word is a minus or a hyphen: 7-3, top-10. What follows a letter is
    # part of a name (x2), what follows a digit and a dot of a version (1.2.3).
    r"(?:(?<![\w)])(?P<sign>[-+\N{MINUS SIGN}]))?[$€£¥]?"
    r"(?<!\w)(?<![0-9]\.)"
    # 2 1/2 is one number: its fraction alone would equal that of 3 1/2.
    r"(?:(?P<whole>[0-9]+) (?=[0-9]+/[0-9]))?"
    rf"(?P<above>{_DIGITS})"
    r"(?:[eE](?P<exponent>[-+\N{MINUS SIGN}]?[0-9]+))?"
    rf"(?: ?/ ?(?P<below>{_DIGITS}))?"
    r"(?: ?\\?(?P<percent>%))?"
)


@dataclass(frozen=True)
class Number:
    value: Fraction
    percent: bool  # as in "50%", of which `value` is 50

    def equals(self, other: Number, tolerance: Fraction) -> bool:
        """Whether they differ by `tolerance` at most. Where one alone is a percentage, 50% equals
        both 50 and 0.5: answers are written either way."""
        if abs(self.value - other.value) <= tolerance:
            return True
        if self.percent == other.percent:
            return False
        share, plain = (self, other) if self.percent else (other, self)
        return abs(share.value / 100 - plain.value) <= tolerance


def last_number_in(text: str) -> Number | None:
    """The last number in `text`; None where there is none, or none that can be computed with: 1/0,
    or more than 1,000 digits."""
    found = list(_NUMBER.finditer(text))
    return _read(found[-1]) if found else None


def number(text: str) -> Number | None:
    """The number that all of `text` is, or None."""
    found = _NUMBER.fullmatch(text.strip())
    return _read(found) if found is not None else None


def _read(found: re.Match[str]) -> Number | None:
    if len(found[0]) > _MOST_DIGITS:
        return None
    exponent = int((found["exponent"] or "0").replace("\N{MINUS SIGN}", "-"))
    if abs(exponent) > _MOST_DIGITS:
        return None
    value = Fraction(found["above"].replace(",", "")) * Fraction(10) ** exponent
    below = Fraction((found["below"] or "1").replace(",", ""))
    if below == 0:
        return None
    sign = -1 if found["sign"] in ("-", "\N{MINUS SIGN}") else 1
    value = int(found["whole"] or 0) + value / below
    return Number(sign * value, found["percent"] is not None)

"""Numbers in text, as people and models write them, read exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_MOST_DIGITS = 1000  # of a number, and its largest exponent: 1e999999999 would fill the memory
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_SIGNS = "[+\N{MINUS SIGN}-]"
_RAISED = rf"\^ ?\{{{{?(?P<{{}}>{_SIGNS}?[0-9]+)\}}}}?"
_NUMBER = re.compile(
    # What stands behind a ^ is an exponent, of cm^2 too.
    rf"(?<!\^)(?<!\^\{{)(?<!\^{_SIGNS})(?<!\^\{{{_SIGNS})"
    # A sign after a digit or a word is a minus or a hyphen: 7-3, top-10. What follows a letter is
    # part of a name (x2), what follows a digit and a dot of a version (1.2.3).
    r"(?:(?<![\w)])(?P<sign>[-+\N{MINUS SIGN}]))?[$€£¥]?"
    r"(?<!\w)(?<![0-9]\.)"
    # 2 1/2 is one number: its fraction alone would equal that of 3 1/2.
    r"(?:(?P<whole>[0-9]+) (?=[0-9]+/[0-9]))?"
    rf"(?P<above>{_DIGITS})"
    r"(?:[eE](?P<exponent>[-+\N{MINUS SIGN}]?[0-9]+))?"
    rf"(?:{_RAISED.format('power')})?"
    rf"(?: ?(?:\\times|\\cdot|[\N{{MULTIPLICATION SIGN}}*]) ?10{_RAISED.format('tens')})?"
    rf"(?: ?/ ?(?P<below>{_DIGITS}))?"
    r"(?: ?\\?(?P<percent>%))?"
)
_AFTER_DIGIT = re.compile(r"[0-9](?=\\[dtc]?frac)")  # 2\frac{1}{2} is 2 1/2
_FRACTION = re.compile(r"\\[dtc]?frac ?\{(-?)([0-9]+)\} ?\{([0-9]+)\}")


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
    found = list(_NUMBER.finditer(_plain(text)))
    return _read(found[-1]) if found else None


def number(text: str) -> Number | None:
    """The number that all of `text` is, or None."""
    found = _NUMBER.fullmatch(_plain(text).strip())
    return _read(found) if found is not None else None


def _plain(text: str) -> str:
    """Without what LaTeX writes otherwise: 1{,}234 as 1,234, \\frac{7}{2} as 7/2."""
    return _FRACTION.sub(r"\1\2/\3", _AFTER_DIGIT.sub(r"\g<0> ", text.replace("{,}", ",")))


def _read(found: re.Match[str]) -> Number | None:
    if len(found[0]) > _MOST_DIGITS:
        return None
    exponent, power, tens = (
        int((found[name] or none).replace("\N{MINUS SIGN}", "-"))
        for name, none in (("exponent", "0"), ("power", "1"), ("tens", "0"))
    )
    digits = found["above"].replace(",", "")
    if max(abs(exponent), abs(tens), len(digits) * abs(power)) > _MOST_DIGITS:
        return None
    base = Fraction(digits)
    if base == 0 and power < 0:
        return None
    value = base**power * Fraction(10) ** (exponent + tens)
    below = Fraction((found["below"] or "1").replace(",", ""))
    if below == 0:
        return None
    sign = -1 if found["sign"] in ("-", "\N{MINUS SIGN}") else 1
    value = int(found["whole"] or 0) + value / below
    return Number(sign * value, found["percent"] is not None)

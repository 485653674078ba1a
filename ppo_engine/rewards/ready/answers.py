"""Answers as data have them, as text."""

from __future__ import annotations

import json
from typing import Any


def as_text(answer: Any) -> str:
    """Text as it is, all else as JSON writes it: 42 is "42", True is "true"."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)

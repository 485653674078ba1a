"""The file of the page: data, style and program in one, of which the browser runs no more than this
program."""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ppo_engine.pages.report.collect import collect
from ppo_engine.pages.report.curves import panels, sections
from ppo_engine.pages.report.rollouts import TOKENS

NAME = "report.html"
MARK = '<meta name="generator" content="ppo-engine report">'  # what may be written over

# In this order they are one program.
_PROGRAM = (
    "elements", "numbers", "axes", "plot", "curves", "runs", "table", "tokens", "response",
    "rollouts", "held_out", "main",
)  # fmt: skip
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def write_page(runs: Sequence[str | Path], path: str | Path, *, by_run: bool = False) -> None:
    """Write the page of these run folders, over each other where there are several, to `path`:
    whole or not at all. An OSError where that cannot be written.

    A run itself and those who look at it may write it at once, so each has an unfinished file of
    its own. The run's (`by_run`) has one name, so that it writes over what a kill has left of it.
    """
    path = Path(path)
    text = page([Path(run) for run in runs])
    partial = path.with_name(f".{path.name}.{'run' if by_run else os.getpid()}.partial")
    try:
        # A folder's name may be no UTF-8.
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def page(runs: Sequence[Path]) -> str:
    """The page as HTML, ASCII but for its program."""
    found = [collect(run, TOKENS // len(runs)) for run in runs]
    names = {name for run in found for name in run["curves"]}
    data = {
        "made": datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        "runs": found,
        "sections": sections(names),
        "panels": panels(names),
    }
    style, program = _file("report.css"), "\n".join(_file(f"{name}.js") for name in _PROGRAM)
    parts = {
        "mark": MARK,
        "policy": f"default-src 'none'; script-src {_hash(program)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "title": html.escape(", ".join(run["name"] for run in found)),
        "style": style,
        "data": as_json(data),
        "program": program,
    }
    # In one go: what stands in data is no place for anything.
    return _PLACE.sub(lambda place: parts[place[1]], _file("report.html"))


def as_json(data: Any) -> str:
    """JSON that ends no element and begins none, wherever its texts come from: ASCII, without
    `<`, `>` and `&`."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return (files("ppo_engine.pages.report") / "static" / name).read_text(encoding="utf-8")

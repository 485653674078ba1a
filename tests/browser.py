"""Pages in a real browser: Debian's chromium, driven by Playwright. Without either, tests skip."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")


def needs_browser() -> Any:
    """A mark for tests, or a whole module, that need one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return pytest.mark.skip(reason="playwright is not installed")
    return pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


class Opened:
    """A page of `browser`, and what went wrong in it: errors of its program, and what its policy
    forbade."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self._context = browser.new_context(viewport={"width": 1300, "height": 900}, **context)
        self.page = self._context.new_page()
        self.page.set_default_timeout(120_000)  # others may use the machine
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.faults.append(said.text) if said.type == "error" else None,
        )
        self.page.on("request", lambda asked: self.requests.append(asked.url))
        self.requests: list[str] = []
        self.page.add_init_script("window.hacked = () => { window.wasHacked = true; };")
        self.page.goto(file.resolve().as_uri())

    def close(self) -> None:
        self._context.close()

"""A real browser for tests: Debian's Chromium, driven by Playwright. Without one they are
skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's Browser."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install 'ppo-engine[dev]'")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()

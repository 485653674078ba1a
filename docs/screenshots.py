"""The pictures of pages, from a real browser: `python docs/screenshots.py` (Debian's chromium, and
`pip install 'ppo-engine[dev]'`).

docs/ranking.png is the page of `ppo-engine rank` on a prompt that is half ranked.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

DOCS = Path(__file__).parent
GUIDELINES = """Is it **true**, and does it answer?

1. Wrong facts are worse than a dull style.
2. Of two that are right, the shorter is better.
3. *Cut off* is no mistake of its own."""
CANDIDATES = [
    {
        "prompt": [{"role": "user", "content": "How do I read a file line by line in Python?"}],
        "responses": [
            "Open it in a `with` block, and loop over it:\n\n```python\n"
            "with open(\"words.txt\") as file:\n    for line in file:\n        print(line.rstrip())"
            "\n```\n\nThe file is closed "
            "at the block's end, **also after an error**.",
            "Use `file.readlines()`. It gives a list of all lines:\n\n```python\nlines = "
            "open(\"words.txt\").readlines()\n```",
            "There are several ways:\n\n- a `for` loop over the file\n- `readline()`, until it is "
            "empty\n- `pathlib.Path(\"words.txt\").read_text()`, which",
            "Python cannot read files line by line.",
        ],
        "finished": [True, True, False, True],
    },
    *(
        {"prompt": f"Question {number}?", "responses": ["One.", "Two."]}
        for number in range(2, 200)
    ),
]  # fmt: skip


def main() -> None:
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        ranking(browser)
        browser.close()


def ranking(browser: Browser) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = "".join(json.dumps(row) + "\n" for row in CANDIDATES)
        (folder / "candidates.jsonl").write_text(rows, encoding="utf-8")
        (folder / "guidelines.md").write_text(GUIDELINES, encoding="utf-8")
        command = [
            sys.executable, "-m", "ppo_engine", "rank", "candidates.jsonl", "--out",
            "rankings.jsonl", "--annotator", "ada", "--guidelines", "guidelines.md",
            "--no-browser",
        ]  # fmt: skip
        server = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert server.stdout is not None
            page = browser.new_page(viewport={"width": 1280, "height": 840})
            page.goto(server.stdout.readline().split()[-1])
            page.locator("#work").wait_for()
            for best in ("Open it in a", "There are several", "Use file.readlines"):
                page.locator(".card", has_text=best).locator("h3").click()
            page.screenshot(path=DOCS / "ranking.png")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()

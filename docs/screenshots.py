"""The pictures of pages, from a real browser: `python docs/screenshots.py` (Debian's chromium, and
`pip install 'ppo-engine[dev]'`).

docs/ranking.png is the page of `ppo-engine rank` on a prompt that is half ranked; docs/report.png
that of the demo's PPO run, which it runs first (some minutes), unless `--run FOLDER` names it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from ppo_engine.pages.report.page import write_page

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


# What is left of a run's page, so that one picture has curves and tokens.
_EXCERPT = """() => {
    const drop = (what, from) => [...document.querySelectorAll(what)].slice(from)
        .forEach((one) => one.remove());
    drop("#curves .fold", 1);
    drop("#curves .curve", 4);
    drop("#rollouts table.sorted tbody tr", 3);
    drop("#curves .hint:not(.unit), #curves .controls, .runs, .jumps, nav, footer", 0);
    drop("#held-out, #settings", 0);
    document.querySelector("h1").textContent = "runs/demo/ppo";
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run of ppo, whose page is to be taken")
    run = parser.parse_args().run
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        ranking(browser)
        report(browser, run)
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


def report(browser: Browser, run: Path | None) -> None:
    """The curves, and a response of the newest step token by token, one below the other."""
    with tempfile.TemporaryDirectory() as name:
        if run is None:
            command = [sys.executable, "-m", "ppo_engine", "demo", "--output-dir", f"{name}/demo"]
            subprocess.run(command, check=True)
            run = Path(name, "demo", "ppo")
        write_page([run], Path(name, "page.html"))
        page = browser.new_page(viewport={"width": 1280, "height": 980})
        page.goto(Path(name, "page.html").as_uri())
        page.locator("#rollouts table .sort", has_text="score").click()
        page.locator("#rollouts table.sorted tbody tr").first.click()
        page.get_by_label("Colour by").select_option("advantages")
        page.locator(".token").nth(4).hover()
        page.evaluate(_EXCERPT)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(1_000)  # curves are drawn as they come into sight
        page.screenshot(path=DOCS / "report.png", full_page=True)


if __name__ == "__main__":
    main()

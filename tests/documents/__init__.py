"""`make docs-check`: runs what the pages show, as a reader would, and checks what they name.

README.md, docs/ and the pages of examples/: `page` reads them, `running` runs their commands and
snippets in a terminal and without, `screen` says what a terminal shows in the end, `shown` compares
that with the page, and `names` looks for links, settings, metrics and options that do not exist.
The comments by which a page says how a block is run are in CONTRIBUTING.md.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def all_pages(root: Path = ROOT) -> list[Path]:
    return [
        root / "README.md",
        *sorted((root / "docs").glob("*.md")),
        *sorted((root / "examples").rglob("*.md")),
    ]

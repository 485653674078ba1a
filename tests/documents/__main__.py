"""`make docs-check`: every page, in a new environment, without a terminal and in one.

    PYTHONPATH=tests python -m documents [--here] [--short] [PAGE.md …]

`--here` takes the current environment, `--short` a tiny model with the embedded one's tokenizer.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from documents import ROOT, all_pages, names
from documents.page import PageError
from documents.running import check_page
from documents.surroundings import fresh, here


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="default: all")
    parser.add_argument("--here", action="store_true", help="in the current environment")
    parser.add_argument("--short", action="store_true", help="with a tiny model")
    options = parser.parse_args()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="documents-") as name:
        folder = Path(name)
        where = (here if options.here else fresh)(folder / "environment", short=options.short)
        for page in [path.resolve() for path in options.pages] or all_pages():
            found, ran, left_out = [], 0, []
            try:
                found += names.faults(page, ROOT)
                for terminal in (False, True):
                    place = folder / "reader"
                    shutil.rmtree(place, ignore_errors=True)  # runs leave gigabytes
                    place.mkdir()
                    ran, left_out, of_run = check_page(
                        page, place, where, terminal=terminal, short=options.short
                    )
                    found += of_run
            except PageError as error:
                found.append(str(error))
            title = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
            print(f"{title}: {ran} run, {len(left_out)} not run, {len(found)} faults", flush=True)
            for line in (*left_out, *found):
                print(f"  {line}", flush=True)
            faults += found
    print(f"{len(faults)} faults")
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())

"""`make faults`: plants every fault, and prints how many of each were survived or refused.

    PYTHONPATH=tests python -m faults [MODULE …] [--page FILE.md]

Exits with 1 where anything went wrong, and says what. `--page` writes the tables down for readers;
all modules are run for it, and none of them wrong. A module whose name begins with `_` is one that
others share.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import faults
from bench import machine
from faults import REFUSED, SURVIVED

_COLUMNS = ("fault", "tries", SURVIVED, REFUSED, "wrong")
_PAGE = """# What runs are put through

`make faults` plants every fault below and looks at how it ends: **survived**, as if it had not been
(a run that was killed, with the same bits as one that nobody disturbed); **refused**, with a
message and nothing half done; or **wrong**. It wrote this page on {machine}.
`make test` has short forms of all of them ([tests/faults/](../tests/faults/)).
"""
_TITLES = {"http": "HTTP"}
# By fault: how many tries ended in which way.
Endings = Mapping[str, Counter[str]]


def main() -> int:
    known = [m.name for m in pkgutil.iter_modules(faults.__path__) if not m.name.startswith("_")]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(known))
    parser.add_argument("--page", type=Path, help="write the tables there, as Markdown")
    options = parser.parse_args()
    if unknown := {*options.modules} - {*known}:
        parser.error(f"no modules: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.page and options.modules:
        parser.error("--page is of all modules")
    console, wrong, sections = Console(), 0, []
    for name in options.modules or known:
        module, began = importlib.import_module(f"faults.{name}"), time.monotonic()
        endings: dict[str, Counter[str]] = defaultdict(Counter)
        # Drawn by no thread of its own: some modules fork this process.
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for number, one in enumerate(module.tries(), start=1):
                live.update(Text(f"{name}: {number} tries, of late: {one.fault}"), refresh=True)
                endings[one.fault]["wrong" if one.wrong else one.ending] += 1
                if one.wrong:
                    wrong += 1
                    console.print(f"{one.fault}: {one.ending}", markup=False)
        console.print(_table(endings, f"{name}, {time.monotonic() - began:.0f} s"))
        title = _TITLES.get(name, name.capitalize())
        about = inspect.cleandoc(module.__doc__ or "").partition("\n\n")[0]
        sections.append(f"\n## {title}\n\n{about}\n\n{_markdown(endings)}")
    if options.page and not wrong:
        text = _PAGE.format(machine=machine.describe(torch.device("cpu"))) + "".join(sections)
        options.page.write_text(text, encoding="utf-8")
        console.print(f"The tables are in {options.page}")
    return min(wrong, 1)


def _rows(endings: Endings) -> list[tuple[str, ...]]:
    return [
        (fault, *map(str, (ends.total(), *(ends[ending] for ending in _COLUMNS[2:]))))
        for fault, ends in endings.items()
    ]


def _table(endings: Endings, title: str) -> Table:
    table = Table(*_COLUMNS, title=title)
    for row in _rows(endings):
        table.add_row(*row)
    return table


def _markdown(endings: Endings) -> str:
    lines = [_COLUMNS, ("---", *["--:"] * (len(_COLUMNS) - 1)), *_rows(endings)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())

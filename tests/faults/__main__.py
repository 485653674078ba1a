"""`make faults`: plants every fault, and prints how many of each were survived or refused.

    PYTHONPATH=tests python -m faults [MODULE …]

Exits with 1 where anything went wrong, and says what. A module whose name begins with `_` is one
that others share.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from collections import defaultdict

from rich.console import Console
from rich.table import Table

import faults
from faults import REFUSED, SURVIVED


def main() -> int:
    known = [m.name for m in pkgutil.iter_modules(faults.__path__) if not m.name.startswith("_")]
    endings: dict[str, list[str]] = defaultdict(list)
    wrong, began = 0, time.monotonic()
    for name in sys.argv[1:] or known:
        for one in importlib.import_module(f"faults.{name}").tries():
            endings[one.fault].append(one.ending)
            if one.wrong:
                wrong += 1
                print(f"{one.fault}: {one.ending}", flush=True)
    table = Table("fault", "tries", SURVIVED, REFUSED, "wrong")
    for fault, ends in endings.items():
        well = [ends.count(SURVIVED), ends.count(REFUSED)]
        table.add_row(fault, *map(str, (len(ends), *well, len(ends) - sum(well))))
    Console().print(table)
    print(f"{time.monotonic() - began:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

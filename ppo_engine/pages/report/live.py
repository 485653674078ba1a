"""The page of a run that is going on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ppo_engine.messages import first_line
from ppo_engine.pages.report.page import NAME, write_page

_LARGEST_SHARE = 0.01  # of the time, for pages
_AT_FIRST = 0.1  # seconds that one is taken to cost before any was written


class LivePage:
    """Writes the page of a run every so many steps (`run.report_every`), but for no more than a
    hundredth of the time. It never stops a run: what fails is told once, by `tell`."""

    def __init__(
        self, every: int, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every, self._tell, self._clock = every, tell, clock
        self._last, self._took = clock(), _AT_FIRST
        self._told = False

    def write_if_due(self, run: Path, step: int) -> None:
        """After `step` of the run in this folder."""
        waited = self._clock() - self._last
        if self._every and step % self._every == 0 and waited >= self._took / _LARGEST_SHARE:
            self.write(run)

    def write(self, run: Path) -> None:
        """Write it now."""
        began = self._clock()
        try:
            write_page([run], run / NAME, by_run=True)
        except Exception as error:
            if not self._told:
                why = f"{type(error).__name__}: {first_line(error)}".rstrip(".")
                self._tell(f"{run / NAME} could not be written ({why}); the run is as it was.")
            self._told = True
        self._last = self._clock()
        self._took = self._last - began

"""Faults that a run must survive, or refuse with a message: the long forms, for `make faults`.

Each module here plants one kind of fault and has `tries()`, which yields a `Try` for each time. A
test in the folder of the room that it is about runs a few of them.
"""

from __future__ import annotations

from dataclasses import dataclass

SURVIVED, REFUSED = "survived", "refused"


@dataclass(frozen=True)
class Try:
    """One fault, planted once: the name of its row in the table, and how it ended: SURVIVED,
    REFUSED (with a message, nothing half done), or in words what went wrong."""

    fault: str
    ending: str

    @property
    def wrong(self) -> bool:
        return self.ending not in (SURVIVED, REFUSED)

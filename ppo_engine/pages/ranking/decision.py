"""What a person decided about a prompt, and the row of the output that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ppo_engine.data.columns import is_number
from ppo_engine.data.rows import BadLineError, Row
from ppo_engine.errors import UserError
from ppo_engine.pages.ranking.candidates import Candidate, candidate_of

Mark = Literal["", "all_bad", "skipped"]
MARKS = ("", "all_bad", "skipped")
LONGEST_NAME = 60
_OWN = ("ranks", "annotator", "seconds", "order", "all_bad", "skipped")


@dataclass(frozen=True)
class Decision:
    """The ranks of all responses of a candidate: lower is better, equal ones are tied, None was
    not ranked. Skipped, none is ranked; all bad, they are tied at the worst rank. `order` has the
    responses as their cards stood, of equal ones the first."""

    candidate: Candidate
    annotator: str
    ranks: tuple[int | None, ...]
    order: tuple[int, ...]
    seconds: float  # that the cards were looked at
    mark: Mark = ""

    @property
    def key(self) -> tuple[str, str]:
        """A person decides once about a candidate."""
        return self.annotator, self.candidate.key

    @property
    def by_card(self) -> list[int | None]:
        return [self.ranks[response] for response in self.order]

    def ranks_as(self, other: Candidate) -> list[int | None]:
        """The ranks of the different responses in the order of the `other`, which has the same."""
        return self.candidate.in_order_of(other, self.ranks)

    def row(self) -> Row:
        """As `ppo-engine reward --data` reads it."""
        kept = {name: value for name, value in self.candidate.row.items() if name not in _OWN}
        return {
            **kept,
            "ranks": list(self.ranks),
            "annotator": self.annotator,
            "seconds": self.seconds,
            "order": list(self.order),
            **({self.mark: True} if self.mark else {}),
        }


def decide(
    candidate: Candidate,
    annotator: str,
    order: Sequence[int],
    by_card: Sequence[int | None],
    seconds: float,
    mark: Mark = "",
) -> Decision:
    """A decision from the ranks of the cards, in the `order` in which they stood. Ranks become 0,
    1, 2, … without gaps, and equal responses get the same. A UserError where they cannot be."""
    if mark not in MARKS:
        raise UserError(f"The mark must be one of {', '.join(MARKS[1:])}, not {mark!r}.")
    if mark == "skipped":
        by_card = [None] * len(order)
    elif mark == "all_bad":
        by_card = [len(order) - 1] * len(order)
    else:
        by_card = _dense(by_card, len(order))
    rank_of = dict(zip(order, by_card, strict=True))
    ranks = tuple(rank_of[first] for first in candidate.first_like)
    if not is_number(seconds) or seconds < 0:
        raise UserError(f"The seconds must be a number from 0, not {seconds!r}.")
    return Decision(candidate, annotator, ranks, tuple(order), round(seconds, 1), mark)


def decision_of(row: Any, place: str) -> Decision:
    """The decision in a row of the output; a `BadLineError` where it is none."""
    candidate = candidate_of(row, place)
    annotator, order = row.get("annotator"), row.get("order")
    if not isinstance(annotator, str):
        raise BadLineError("no 'annotator': it is no ranking that `ppo-engine rank` wrote")
    whole = isinstance(order, list) and all(type(number) is int for number in order)
    if not whole or sorted(order) != [*candidate.distinct]:
        raise BadLineError("'order' does not name the different responses, each once")
    ranks = ranks_of(row, candidate)
    mark: Mark = "skipped" if row.get("skipped") else "all_bad" if row.get("all_bad") else ""
    seconds = row.get("seconds")
    seconds = float(seconds) if is_number(seconds) else 0.0
    return Decision(candidate, annotator, ranks, tuple(order), seconds, mark)


def ranks_of(row: Row, candidate: Candidate) -> tuple[Any, ...]:
    """The ranks in a row, None for a response that was not ranked."""
    ranks = row.get("ranks")
    if not isinstance(ranks, list | tuple) or len(ranks) != len(candidate.responses):
        raise BadLineError("no 'ranks', one of each of 'responses'")
    if not all(rank is None or is_number(rank) for rank in ranks):
        raise BadLineError("'ranks' must be numbers or null")
    return tuple(None if rank is None or rank < 0 else rank for rank in ranks)


def person(name: Any) -> str:
    """The name that a person gave, with single spaces; a UserError where it cannot be one."""
    found = " ".join(name.split()) if isinstance(name, str) else ""
    if not found or len(found) > LONGEST_NAME or not found.isprintable():
        raise UserError(f"A name must have 1 to {LONGEST_NAME} characters that can be printed.")
    return found


def _dense(ranks: Sequence[Any], cards: int) -> list[int | None]:
    whole = isinstance(ranks, list | tuple) and all(
        rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0)
        for rank in ranks
    )
    if not whole or len(ranks) != cards:
        raise UserError(f"The ranks must be {cards} whole numbers from 0, or null.")
    places = sorted({rank for rank in ranks if rank is not None})
    if sum(rank is not None for rank in ranks) < 2:
        raise UserError("Rank two responses at least, or skip the prompt.")
    return [None if rank is None else places.index(rank) for rank in ranks]

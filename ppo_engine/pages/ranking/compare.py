"""`ppo-engine agreement`: how far people ranked alike, and where they differ most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from ppo_engine.data.rows import BadLineError, BadLines, Row, read_rows
from ppo_engine.errors import UserError
from ppo_engine.pages.ranking.agreement import Ranks, agreement, kendall_tau
from ppo_engine.pages.ranking.candidates import Candidate, candidate_of
from ppo_engine.pages.ranking.decision import ranks_of
from ppo_engine.pages.ranking.work import REPEATS
from ppo_engine.run.progress import printable
from ppo_engine.text.prompt import show_prompt

_WORST = 5  # prompts on which two people differ most
_CHARACTERS = 60  # of a prompt

Ranked = tuple[Candidate, tuple[Any, ...]]


@dataclass
class Person:
    """What somebody ranked in a file, by the candidates' keys."""

    name: str
    file: str
    ranked: dict[str, Ranked] = field(default_factory=dict)
    again: dict[str, Ranked] = field(default_factory=dict)  # the second time


def compare(files: Sequence[str]) -> Iterator[str]:
    """The lines that `ppo-engine agreement` prints: of each two people in the `files`, over the
    prompts that both ranked, and of each with themselves. A UserError where nothing can be
    compared."""
    people = [person for file in files for person in read_people(file)]
    names = [person.name for person in people]
    for person in people:
        if names.count(person.name) > 1:
            person.name = f"{person.name} ({person.file})"
    found = False
    for person in people:
        if person.again:
            found = True
            yield f"{person.name}, the same again in another order"
            yield f"  {agreement(_aligned(person.ranked, person.again))}"
    for one, other in combinations(people, 2):
        both = list(_aligned(one.ranked, other.ranked))
        if both:
            found = True
            yield f"{one.name} and {other.name}"
            yield f"  {agreement(both)}"
            yield from _differences(one, other)
    if not found:
        who = ", ".join(names)
        raise UserError(
            f"Nothing to compare: no prompt with the same responses was ranked twice ({who})."
        )


def read_people(file: str) -> list[Person]:
    """Who ranked in a file of rankings, and, where `ppo-engine rank` asked for some again, these
    beside it. Rows that name no annotator are of one who is called as the file."""
    people: dict[str, Person] = {}
    for row, ranked in _rankings(file):
        person = people.setdefault(_annotator(row, file), Person(_annotator(row, file), file))
        person.ranked[ranked[0].key] = ranked
    repeats = Path(file + REPEATS)
    if repeats.exists() and repeats.stat().st_size:
        for row, ranked in _rankings(str(repeats)):
            person = people.get(_annotator(row, file))
            if person is not None and ranked[0].key in person.ranked:
                person.again[ranked[0].key] = ranked
    return list(people.values())


def _rankings(file: str) -> Iterator[tuple[Row, Ranked]]:
    """The rows that have ranks of two responses at least: all but what was skipped."""
    bad_lines = BadLines("error", "A ranking has 'prompt', 'responses' and 'ranks'.")
    for place, row in read_rows(file, "rankings", bad_lines):
        try:
            candidate = candidate_of(row, place)
            ranks = ranks_of(row, candidate)
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        if sum(rank is not None for rank in ranks) > 1:
            yield row, (candidate, ranks)


def _annotator(row: Row, file: str) -> str:
    name = row.get("annotator")
    return (printable(name) if isinstance(name, str) else "") or Path(file).name


def _aligned(ours: dict[str, Ranked], theirs: dict[str, Ranked]) -> Iterator[tuple[Ranks, Ranks]]:
    """The ranks of the different responses to each prompt that both have."""
    for key, (candidate, ranks) in ours.items():
        if key in theirs:
            other, others = theirs[key]
            yield candidate.in_order_of(candidate, ranks), other.in_order_of(candidate, others)


def _differences(one: Person, other: Person) -> Iterator[str]:
    """The prompts with the lowest τ, below 1, and how both ranked: by the numbers of the responses
    in the file of the one, best first."""
    found = []
    for key, (candidate, ranks) in one.ranked.items():
        if key in other.ranked:
            theirs, others = other.ranked[key]
            pair = [
                candidate.in_order_of(candidate, ranks),
                theirs.in_order_of(candidate, others),
            ]
            tau = kendall_tau(*pair)
            if tau is not None and tau < 1:
                found.append((tau, candidate, pair))
    found.sort(key=lambda item: item[0])
    if found:
        yield "  they differ most on"
    width = max(len(one.name), len(other.name))
    for tau, candidate, pair in found[:_WORST]:
        text = " ".join(printable(show_prompt(candidate.prompt)).split())
        cut = text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
        yield f"    {candidate.place}: {cut} (τ {tau:.2f})"
        for who, ranks in zip((one, other), pair, strict=True):
            yield f"      {who.name:<{width}}  {_in_words(ranks, candidate.distinct)}"


def _in_words(ranks: Ranks, numbers: Sequence[int]) -> str:
    """Such as "3 > 1 = 2", of responses numbered from 1; those not ranked behind a semicolon."""
    groups: dict[float, list[str]] = {}
    for rank, number in zip(ranks, numbers, strict=True):
        if rank is not None:
            groups.setdefault(rank, []).append(str(number + 1))
    order = " > ".join(" = ".join(groups[rank]) for rank in sorted(groups))
    left = [str(n + 1) for rank, n in zip(ranks, numbers, strict=True) if rank is None]
    return f"{order}; {', '.join(left)} not ranked" if left else order

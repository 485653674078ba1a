"""In which order a person is shown what: the prompts as their file has them, some of them twice;
the responses shuffled, for each person otherwise.

All of it follows from the seed and the person's name, so that a server that is started again goes
on as before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

ONE_IN = 20  # prompts that come again
LATER = 10  # after as many others, if there are that many


@dataclass(frozen=True)
class Task:
    """A prompt to be ranked, by its number among the candidates; `again`, a second time, to see
    whether the person agrees with themselves."""

    candidate: int
    again: bool = False


def plan(count: int, seed: int, annotator: str) -> list[Task]:
    """The tasks of a person with `count` prompts: of each 20 one comes again, of a remainder one
    with the chance that this leaves it."""
    again: dict[int, list[int]] = {}  # by the number after which they come
    for start in range(0, count, ONE_IN):
        draw = random.Random(f"{seed}/{annotator}/{start}")
        end = min(start + ONE_IN, count)
        if draw.random() * ONE_IN < end - start:
            # One that leaves room for others before it comes again, where there is one.
            chosen = draw.randrange(start, max(start + 1, min(end, count - LATER)))
            again.setdefault(min(chosen + LATER, count - 1), []).append(chosen)
    tasks = []
    for number in range(count):
        tasks.append(Task(number))
        tasks += [Task(chosen, again=True) for chosen in again.get(number, ())]
    return tasks


def shuffled(
    shown: Sequence[int], seed: int, annotator: str, key: str, before: Sequence[int] | None = None
) -> list[int]:
    """The responses `shown` of the candidate `key` in the order of their cards; another one than
    `before`, where they come again."""
    order = list(shown)
    again = "/again" * (before is not None)
    random.Random(f"{seed}/{annotator}/{key}{again}").shuffle(order)
    return order[1:] + order[:1] if before is not None and order == [*before] else order

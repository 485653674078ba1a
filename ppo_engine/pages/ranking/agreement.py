"""How far two rankings of the same responses agree, and two people over many prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from ppo_engine.messages import counted

Ranks = Sequence[float | None]  # lower is better, equal is tied, None was not ranked


@dataclass(frozen=True)
class Agreement:
    """Over `prompts` that both ranked.

    `tau` is the mean of the prompts' Kendall's τ-b, of the `tau_prompts` on which neither found all
    equal. `accuracy` is the share of `pairs`, those that at least one of the two put in an order,
    that both put in the same; a tie of the other counts half. Each with its standard error over
    prompts (pairs of one are not independent); None where there are too few.
    """

    prompts: int
    tau_prompts: int
    tau: float | None
    tau_error: float | None
    pairs: int
    accuracy: float | None
    accuracy_error: float | None

    def __str__(self) -> str:
        if not self.pairs:
            return f"{counted(self.prompts, 'prompt')}, of which none has a pair in an order"
        tau = "not to be told"
        if self.tau is not None:
            tau = f"{self.tau:.2f}{_plus_minus(self.tau_error, '.2f')}"
        right = f"{self.accuracy:.1%}{_plus_minus(self.accuracy_error, '.1%')}"
        return (
            f"Kendall's τ {tau}, {right} of {counted(self.pairs, 'pair')} alike (± standard "
            f"error), {counted(self.prompts, 'prompt')}"
        )


def agreement(rankings: Iterable[tuple[Ranks, Ranks]]) -> Agreement:
    """Of two people, from their ranks of the same responses, prompt by prompt."""
    taus, pairs, prompts = [], [], 0
    for ours, theirs in rankings:
        found = list(_compared(ours, theirs))
        if not found:
            continue
        prompts += 1
        tau = kendall_tau(ours, theirs)
        if tau is not None:
            taus.append(tau)
        ordered = [_alike(a, b) for a, b in found if a or b]
        if ordered:
            pairs.append((sum(ordered), len(ordered)))
    mean, error = _ratio([(tau, 1) for tau in taus])
    accuracy, accuracy_error = _ratio(pairs)
    count = sum(count for _, count in pairs)
    return Agreement(prompts, len(taus), mean, error, count, accuracy, accuracy_error)


def kendall_tau(ours: Ranks, theirs: Ranks) -> float | None:
    """Kendall's τ-b of two rankings, of the responses that both ranked: 1 is the same order, -1
    the opposite; a tie in one alone counts against it (Kendall 1945). None where one of them ties
    all.

        τ-b = (C - D) / sqrt((C + D + T_a) (C + D + T_b))

    with C pairs in the same order, D in opposite ones, and T tied by the one or the other alone.
    """
    found = list(_compared(ours, theirs))
    difference = sum(a * b for a, b in found)
    ordered = [sum(a != 0 for a, _ in found), sum(b != 0 for _, b in found)]
    return difference / math.sqrt(math.prod(ordered)) if all(ordered) else None


def _compared(ours: Ranks, theirs: Ranks) -> Iterator[tuple[int, int]]:
    """For each pair of responses that both ranked, how each ordered it: -1, 0 (a tie) or 1."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    for (a, b), (c, d) in combinations(both, 2):
        yield (a > c) - (a < c), (b > d) - (b < d)


def _alike(a: int, b: int) -> float:
    return (1 + a * b) / 2


def _ratio(of_prompts: Sequence[tuple[float, int]]) -> tuple[float | None, float | None]:
    """The sum of the first by that of the second, and its standard error over prompts
    (Cochran 1977, 2.11): of a mean where all of the second are 1."""
    count = sum(n for _, n in of_prompts)
    if not count:
        return None, None
    ratio = sum(x for x, _ in of_prompts) / count
    m = len(of_prompts)
    if m < 2:
        return ratio, None
    squares = sum((x - ratio * n) ** 2 for x, n in of_prompts)
    return ratio, math.sqrt(squares * m / (m - 1)) / count


def _plus_minus(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"

"""Reward against KL of the runs of `bench/learning.py`: curves over seeds, and which is above."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.results import Row

_PLACES = 25  # of the KL at which curves are read
_TABLE = 4  # of those places, a table has one in so many
_LEAST = 1e-6  # spread: at KL 0, where all sides are one policy, it is what rounding leaves


@dataclass(frozen=True)
class Curve:
    """A side's reward at each KL (nats a response): mean and deviation of its seeds' curves."""

    kl: list[float]
    reward: list[float]
    spread: list[float]


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """One for each side, from KL 0 to the least of what the seeds of all sides reached.

    Between the policies that were held, a seed's curve is a straight line.
    """
    runs: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        points = runs.setdefault(row["side"], {}).setdefault(row["seed"], [])
        points.append((row["kl"], row["reward"]))
    end = min(max(kl for kl, _ in run) for side in runs.values() for run in side.values())
    grid = np.linspace(0, end, _PLACES)
    found = {}
    for side, seeds in runs.items():
        each = [np.interp(grid, *np.array(sorted(run)).T) for run in seeds.values()]
        columns = [[float(x) for x in column] for column in zip(*each, strict=True)]
        spread = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in columns]
        found[side] = Curve(
            [float(kl) for kl in grid], [statistics.mean(x) for x in columns], spread
        )
    return found


def below(of: Curve, other: Curve) -> float:
    """By how many spreads (of the two sides together) `of` is below `other` where that is most;
    0 where it nowhere is."""
    return max(
        (b - a) / max((s**2 + t**2) ** 0.5, _LEAST) if b > a else 0.0
        for a, b, s, t in zip(of.reward, other.reward, of.spread, other.spread, strict=True)
    )


def judged(found: Mapping[str, Curve], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """For each pair of sides that were run, whether the first is at or above the second at every
    KL, within their spread."""
    lines = []
    for one, other in pairs:
        if one not in found or other not in found:
            continue
        if not any([*found[one].spread, *found[other].spread]):
            lines.append(f"{one} beside {other}: one seed has no spread to judge by")
            continue
        most = below(found[one], found[other])
        mean = statistics.mean(
            a - b for a, b in zip(found[one].reward, found[other].reward, strict=True)
        )
        verdict = "met" if most <= 1 else "MISSED"
        lines.append(
            f"{one} beside {other}, at equal KL: reward {mean:+.2f} on average, at its lowest "
            f"{most:.1f} spreads below, target <= 1: {verdict}"
        )
    return lines


def table(found: Mapping[str, Curve]) -> list[str]:
    """Lines of Markdown: each side's reward and its spread at some places of the KL."""
    lines = [
        f"| KL, nats a response | {' | '.join(found)} |",
        f"| --: |{' --: |' * len(found)}",
    ]
    for place, kl in enumerate(next(iter(found.values())).kl):
        if place % _TABLE == 0:
            cells = [f"{c.reward[place]:+.2f} ± {c.spread[place]:.2f}" for c in found.values()]
            lines.append(f"| {kl:.1f} | {' | '.join(cells)} |")
    return lines

"""The metrics of a run as the page draws them: by name, not too many points of each, in sections
with titles."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ppo_engine.run.panels import PANELS

POINTS = 2_000  # of a curve, about as many as a screen has columns
_DIGITS = 7  # significant, of a number on the page: as many as fp32 has

# What a metric's name begins with, and the title that it stands under.
_SECTIONS = {
    "objective": "Objective",
    "rewards": "Each reward",
    "eval": "Held-out prompts",
    "policy": "Policy",
    "value": "Critic",
    "sft": "Fine-tuning",
    "reward": "Reward model",
    "rollout": "Sampler",
    "tokens_per_second": "Speed",
    "time": "Time, seconds",
    "mfu": "Use of the machine",
    "overhead": "Time outside the models",
    "padding": "Padding",
    "memory": "Memory, GiB",
}
_OTHER = "Other"
_ERROR = "_se"  # a standard error is the band of what it is of


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Of each metric its steps `x` and its numbers `y`, at most about `POINTS`; a number that was
    not finite is None, and a gap."""
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    for row in rows:
        step = row["step"]
        for name, value in row.items():
            if name != "step" and (value is None or _is_number(value)):
                x, y = found.setdefault(name, ([], []))
                x.append(step)
                y.append(value)
    drawn = {name: one for name, one in found.items() if any(y is not None for y in one[1])}
    kept = {name: _kept(*one) for name, one in drawn.items()}
    for name, band in _bands(drawn).items():  # it is drawn at the points of what it is of
        steps = {drawn[name][0][i] for i in kept[name]}
        kept[band] = [i for i, step in enumerate(drawn[band][0]) if step in steps]
    return {
        name: {"x": [x[i] for i in kept[name]], "y": [_short(y[i]) for i in kept[name]]}
        for name, (x, y) in drawn.items()
    }


def sections(names: Iterable[str]) -> list[dict[str, Any]]:
    """The `names` of metrics, under their titles: those with a panel of `report.png` first."""
    order = {panel.metric: number for number, panel in enumerate(PANELS)}
    titled: dict[str, list[str]] = {title: [] for title in (*_SECTIONS.values(), _OTHER)}
    known = set(names)
    single = known - set(_bands(known).values())
    for name in sorted(single, key=lambda name: (order.get(name, len(order)), name)):
        titled[_SECTIONS.get(name.partition("/")[0], _OTHER)].append(name)
    return [{"title": title, "metrics": found} for title, found in titled.items() if found]


def panels(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is drawn with each of the `names`: title, unit, band, percent, level."""
    known = set(names)
    found = {panel.metric: asdict(panel) for panel in PANELS if panel.metric in known}
    for name, band in _bands(known).items():
        found.setdefault(name, {"title": name, "unit": "± SE", "band": band})
    return found


def _bands(names: Collection[str]) -> dict[str, str]:
    """Of the `names` that have one, which other of them is the half width of their band."""
    found = {name: f"{name}{_ERROR}" for name in names}
    found |= {panel.metric: panel.band for panel in PANELS if panel.band}
    return {name: band for name, band in found.items() if name in names and band in names}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kept(x: Sequence[int], y: Sequence[float | None]) -> list[int]:
    """Which points are drawn: all, or of each of equal stretches the lowest and the highest, so
    that no peak is lost, and the ends."""
    if len(x) <= POINTS:
        return [*range(len(x))]
    size = math.ceil(len(x) / (POINTS // 2))
    chosen = {0, len(x) - 1}
    for start in range(0, len(x), size):
        there = [i for i in range(start, min(start + size, len(x))) if y[i] is not None]
        if there:
            chosen |= {min(there, key=y.__getitem__), max(there, key=y.__getitem__)}  # type: ignore[arg-type]
    return sorted(chosen)


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")

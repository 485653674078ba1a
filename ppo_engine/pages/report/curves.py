"""The metrics of a run as the page draws them: by name, not too many points of each, in sections
with titles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
    return {
        name: dict(zip("xy", _thinned(x, y), strict=True))
        for name, (x, y) in found.items()
        if any(value is not None for value in y)
    }


def sections(names: Iterable[str]) -> list[dict[str, Any]]:
    """The `names` of metrics, under their titles: those with a panel of `report.png` first."""
    order = {panel.metric: number for number, panel in enumerate(PANELS)}
    bands = {panel.band for panel in PANELS}
    titled: dict[str, list[str]] = {title: [] for title in (*_SECTIONS.values(), _OTHER)}
    known = set(names)
    for name in sorted(known, key=lambda name: (order.get(name, len(order)), name)):
        of_band = name in bands or (name.endswith(_ERROR) and name[: -len(_ERROR)] in known)
        if not of_band:
            titled[_SECTIONS.get(name.partition("/")[0], _OTHER)].append(name)
    return [{"title": title, "metrics": found} for title, found in titled.items() if found]


def panels(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is drawn with each of the `names`: title, unit, band, percent, level."""
    known = set(names)
    found = {panel.metric: asdict(panel) for panel in PANELS if panel.metric in known}
    for name in known - found.keys():
        error = f"{name}{_ERROR}"
        if error in known:
            found[name] = {"title": name, "unit": "± SE", "band": error}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(x: Sequence[int], y: Sequence[float | None]) -> tuple[list[int], list[float | None]]:
    """All points, or of each of equal stretches the lowest and the highest, so that no peak is
    lost, and the ends."""
    kept: Iterable[int] = range(len(x))
    if len(x) > POINTS:
        size = math.ceil(len(x) / (POINTS // 2))
        chosen = {0, len(x) - 1}
        for start in range(0, len(x), size):
            there = [i for i in range(start, min(start + size, len(x))) if y[i] is not None]
            if there:
                chosen |= {min(there, key=y.__getitem__), max(there, key=y.__getitem__)}  # type: ignore[arg-type]
        kept = sorted(chosen)
    return [x[i] for i in kept], [_short(y[i]) for i in kept]


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")

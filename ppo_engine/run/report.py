"""The plot of a run, `report.png`: the curves of its metrics.jsonl, and how well its critic
predicts the reward, from the points of critic.jsonl."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ppo_engine.data.rows import BadLines, read_jsonl
from ppo_engine.errors import UserError
from ppo_engine.messages import unwritten
from ppo_engine.run.panels import PANELS, Panel

_COLORS = ("#2a6fbb", "#d1602b", "#3b8f5a", "#8457a8", "#b08a1e", "#7a7a7a")
_MANY_POINTS = 40  # more are drawn faintly, behind their running mean
_PANEL_INCHES = (3.6, 2.6)  # with what surrounds its axes
_AROUND_INCHES = (0.9, 0.75)  # of a panel: what its ticks, labels and title take
_GUIDE: dict[str, Any] = {"color": "#7a7a7a", "linewidth": 0.8, "linestyle": ":"}
_ANTICIPATION = "value/anticipation_"
_MFU = "mfu/"
_REWARD = re.compile(r"rewards/(.+)/mean")
_FOOTER = "docs/metrics.md says what each curve means"


def write_curves(run: str | Path, path: str | Path, title: str = "") -> None:
    """Draw the curves of `run`, a run folder or its metrics.jsonl, as a PNG at `path`.

    Metrics that the run does not have are left out; a run without any is a `UserError`.
    """
    file = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    rows = [row for _, row in read_jsonl(file, BadLines("skip"))]
    panels = [_drawing(panel) for panel in PANELS if _points(rows, panel.metric)[0].size]
    panels += _critic_panels(rows, file.with_name("critic.jsonl"))
    if any(_REWARD.fullmatch(name) for row in rows for name in row):
        panels.insert(1, _draw_rewards)
    phases = sorted({name for row in rows for name in row if name.startswith("time/")})
    if phases:
        panels.append(lambda axes, rows: _draw_times(axes, rows, phases))
    if any(name.startswith(_MFU) for row in rows for name in row):
        panels.append(_draw_mfu)
    if not panels:
        raise UserError(f"{file} has no metrics to draw.")
    columns = min(4, math.ceil(len(panels) / 2))
    lines = math.ceil(len(panels) / columns)
    # By hand: an engine of layouts draws all twice.
    (wide, high), (beside, between) = _PANEL_INCHES, _AROUND_INCHES
    width, height = columns * wide, lines * high + 0.5
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.75 / width,
        right=1 - 0.15 / width,
        bottom=0.75 / height,
        top=1 - 0.6 / height,
        wspace=beside / (wide - beside),
        hspace=between / (high - between),
    )
    figure.suptitle(title or file.parent.name, fontsize=12, fontweight="bold")
    figure.supxlabel(_FOOTER, fontsize=7.5, color=_GUIDE["color"])
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, draw in zip(axes, panels, strict=False):
        draw(place, rows)
        place.tick_params(labelsize=8)
        place.spines[["top", "right"]].set_visible(False)
        place.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        place.set_axisbelow(True)
        place.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        place.yaxis.set_major_locator(MaxNLocator(5))
    for place in axes[len(panels) :]:
        place.set_axis_off()
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=130)
        os.replace(partial, path)
    except OSError as error:
        raise unwritten(str(path), error) from error
    finally:
        partial.unlink(missing_ok=True)


def _points(rows: list[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a number for `metric`."""
    found = [
        (row["step"], row[metric])
        for row in rows
        if isinstance(row.get(metric), int | float) and "step" in row
    ]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _drawing(panel: Panel) -> Callable[[Axes, list[dict]], None]:
    def draw(axes: Axes, rows: list[dict]) -> None:
        steps, values = _points(rows, panel.metric)
        color = _COLORS[0]
        if panel.band:
            _draw_band(axes, rows, panel, color)
        if len(steps) > _MANY_POINTS:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
            axes.plot(steps, _running_mean(values), color=color, linewidth=1.8)
        else:
            axes.plot(steps, values, color=color, linewidth=1.5, marker="o", markersize=2.5)
        if panel.held_out and _points(rows, panel.held_out)[0].size:
            style: dict[str, Any] = {"color": _COLORS[1], "linewidth": 1.2, "linestyle": "--"}
            axes.plot(*_points(rows, panel.held_out), marker="o", ms=3, label="held out", **style)
            axes.legend(fontsize=7, frameon=False, loc="best")
        if panel.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        if panel.level is not None:
            axes.axhline(panel.level, **_GUIDE)
        _over_steps(axes, rows)
        _label(axes, panel.title, panel.unit)

    return draw


def _draw_band(axes: Axes, rows: list[dict], panel: Panel, color: str) -> None:
    both = [row for row in rows if isinstance(row.get(panel.band), int | float)]
    steps, values = _points(both, panel.metric)
    _, half = _points([row for row in both if row.get(panel.metric) is not None], panel.band)
    if len(steps) == 1:
        axes.errorbar(steps, values, half, color=color, capsize=4)
    else:
        axes.fill_between(steps, values - half, values + half, color=color, alpha=0.15, lw=0)


def _draw_times(axes: Axes, rows: list[dict], phases: list[str]) -> None:
    timed = [row for row in rows if "step" in row and any(phase in row for phase in phases)]
    steps = np.array([row["step"] for row in timed])
    seconds = np.array([[row.get(phase) or 0.0 for row in timed] for phase in phases])
    order = np.argsort(-seconds.sum(axis=1))
    below = np.zeros(len(steps))
    for color, index in zip(_COLORS * len(phases), order, strict=False):
        share = seconds[index].sum() / max(seconds.sum(), 1e-12)
        label = f"{phases[index].removeprefix('time/')} {share:.0%}"
        axes.bar(steps, seconds[index], width=1.0, bottom=below, color=color, label=label, lw=0)
        below += seconds[index]
    room = 1.15 + 0.13 * math.ceil(len(phases) / 2)  # for the legend
    axes.set_ylim(0, max(below.max() * room, 1e-9))
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper left", handlelength=1.0)
    _over_steps(axes, rows)
    _label(axes, "Time of a step", "seconds")


def _draw_rewards(axes: Axes, rows: list[dict]) -> None:
    """The mean of each of several rewards, before weights; dashed, of the held-out prompts."""
    matches = map(_REWARD.fullmatch, dict.fromkeys(name for row in rows for name in row))
    for number, reward in enumerate(match[1] for match in matches if match):
        style: dict[str, Any] = {"color": _COLORS[number % len(_COLORS)], "lw": 1.5}
        steps, values = _points(rows, f"rewards/{reward}/mean")
        curve = _running_mean(values) if len(steps) > _MANY_POINTS else values
        axes.plot(steps, curve, marker="o", ms=2.5, label=reward, **style)
        axes.plot(*_points(rows, f"eval/rewards/{reward}"), ls="--", marker="o", ms=3, **style)
    axes.legend(fontsize=7, frameon=False, loc="best", handlelength=1.0)
    _over_steps(axes, rows)
    _label(axes, "Each reward", "mean; dashed: held out")


def _draw_mfu(axes: Axes, rows: list[dict]) -> None:
    """Of each phase, and in black of the whole step."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(_MFU))
    for number, name in enumerate(sorted(names, key=f"{_MFU}step".__eq__)):
        steps, values = _points(rows, name)
        whole = name == f"{_MFU}step"
        style: dict[str, Any] = {"color": "black" if whole else _COLORS[number % len(_COLORS)]}
        curve = _running_mean(values) if len(steps) > _MANY_POINTS else values
        label = f"{name.removeprefix(_MFU)} {values.mean():.0%}"
        axes.plot(steps, curve, lw=1.5, marker="o", ms=2.5, label=label, **style)
    room = 1.15 + 0.13 * math.ceil(len(names) / 2)  # for the legend
    axes.set_ylim(0, max(axes.get_ylim()[1] * room, 1e-9))
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper left", handlelength=1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    _over_steps(axes, rows)
    _label(axes, "MFU", "of this machine's matrix rate")


def _critic_panels(rows: list[dict], file: Path) -> list[Callable[[Axes, list[dict]], None]]:
    """How well the critic predicts the score: by the part of the response read, and at one part."""
    panels: list[Callable[[Axes, list[dict]], None]] = []
    if any(_anticipation(row) for row in rows):
        panels.append(_draw_anticipation)
    points = [row for _, row in read_jsonl(file, BadLines("skip"))] if file.exists() else []
    if points:
        panels.append(lambda axes, _: _draw_foreseen(axes, points[-1]))
    return panels


def _anticipation(row: dict) -> list[tuple[int, float]]:
    """(percent read, correlation) of one evaluation."""
    found = (
        (int(name.removeprefix(_ANTICIPATION)), value)
        for name, value in row.items()
        if name.startswith(_ANTICIPATION) and value is not None
    )
    return sorted(found)


def _draw_anticipation(axes: Axes, rows: list[dict]) -> None:
    found = [(row["step"], _anticipation(row)) for row in rows if _anticipation(row)]
    for (step, curve), alpha in zip([found[-1], *found[:1]], (1.0, 0.35), strict=True):
        if alpha == 1.0 or len(found) > 1:
            percent, correlation = zip(*curve, strict=True)
            style: dict[str, Any] = {"color": _COLORS[3], "alpha": alpha, "linewidth": 1.5}
            axes.plot(percent, correlation, marker="o", ms=3, label=f"step {step}", **style)
    axes.axhline(0, **_GUIDE)
    axes.legend(fontsize=7, frameon=False, loc="best", handlelength=1.5)
    axes.set_xlim(5, 105)
    axes.set_ylim(top=1.02)
    axes.set_xlabel("% of the held-out response read", fontsize=8)
    _label(axes, "Critic's value and the final score", "correlation")


def _draw_foreseen(axes: Axes, points: dict) -> None:
    """Predicted value against final score, of one evaluation."""
    pairs = np.array([points["scores"], points["values"]], dtype=float)  # None, not finite, is NaN
    scores, values = pairs[:, np.isfinite(pairs).all(0)]
    axes.scatter(scores, values, s=12, color=_COLORS[3], alpha=0.5, lw=0)
    if len(scores):
        axes.axline((scores.mean(), scores.mean()), slope=1, label="value = score", **_GUIDE)
        axes.legend(fontsize=7, frameon=False, loc="best")
    axes.set_xlabel(f"final score of a held-out response, step {points['step']}", fontsize=8)
    _label(axes, f"Critic at {points['read']} % of the response", "its value")


def _over_steps(axes: Axes, rows: list[dict]) -> None:
    steps = [row["step"] for row in rows if "step" in row]
    axes.set_xlim(min(steps) - 0.6, max(steps) + 0.6)
    axes.set_xlabel("step", fontsize=8)


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left", y=1.0)
    axes.set_ylabel(unit, fontsize=8)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centered window of a twentieth of the run, narrower at its ends."""
    half = max(2, len(values) // 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])

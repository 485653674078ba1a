"""Curves of `run.py`: time against size, both logarithmic, with the floor; of `growth.py`, and of
`learning.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from bench.learning_curves import Curve
from bench.results import Row

matplotlib.use("agg")
import matplotlib.pyplot as plt

_COLUMNS = 3


def plot(rows: Sequence[Row], machine: str, path: Path) -> None:
    """One panel for each op, mode and dtype; ours with markers, the floor dashed."""
    panels: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        panels[f"{row['op']}, {row['mode']}, {row['dtype']}"].append(row)
    lines = -(-len(panels) // _COLUMNS)
    figure, axes = plt.subplots(
        lines, _COLUMNS, figsize=(5.2 * _COLUMNS, 3.9 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(title, fontsize=10)
        axis.set(xscale="log", yscale="log", xlabel="elements", ylabel="ms")
        floors = sorted({(_elements(row), row["floor_ms"]) for row in panel})
        axis.plot(*zip(*floors, strict=True), "k--", label="floor")
        for impl in dict.fromkeys(row["impl"] for row in panel):
            points = [
                (_elements(row), row["ms_p50"])
                for row in panel
                if row["impl"] == impl and row["ms_p50"] is not None
            ]
            if not points:
                continue
            ours = any(row["x_best_alternative"] for row in panel if row["impl"] == impl)
            axis.plot(
                *zip(*sorted(points), strict=True), marker="o" if ours else ".",
                linewidth=2 if ours else 1, label=impl,
            )  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(machine)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_growth(rows: Sequence[Row], title: str, path: Path) -> None:
    """Milliseconds a token and peak memory against the response tokens of a step."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10.4, 3.9), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    for phase in ("step", "update", "advantages", "score", "generate"):
        label = "step without generate" if phase == "step" else phase
        style = "--" if phase == "generate" else "-"
        time.plot(tokens, [row[f"{phase}_ms_per_token"] for row in rows], f"o{style}", label=label)
    for column, style, label in (
        ("peak_bytes", "o-", "step without generate"),
        ("sampling_peak_bytes", ".--", "and with it"),
    ):
        memory.plot(tokens, [row[column] / 2**30 for row in rows], style, label=label)
    for axis, unit in ((time, "ms a response token"), (memory, "peak, GiB")):
        axis.set(xscale="log", xlabel="response tokens of a step", ylabel=unit)
        axis.set_xticks(tokens, [f"{n / 1024:g}k" for n in tokens], minor=False)
        axis.minorticks_off()
        axis.set_ylim(0, 1.35 * axis.get_ylim()[1])  # with room for the names
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper left", ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_learning(rows: Sequence[Row], curves: Mapping[str, Curve], path: Path) -> None:
    """Reward against KL: each side's mean over seeds in its spread, and every policy a dot."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, (side, curve) in enumerate(curves.items()):
        color = f"C{number}"
        points = [(row["kl"], row["reward"]) for row in rows if row["side"] == side]
        axis.plot(*zip(*points, strict=True), ".", color=color, alpha=0.5)
        axis.plot(curve.kl, curve.reward, color=color, linewidth=2, label=side)
        low, high = (
            [y + sign * s for y, s in zip(curve.reward, curve.spread, strict=True)]
            for sign in (-1, 1)
        )
        axis.fill_between(curve.kl, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set(xlabel="KL to the reference, nats a response", ylabel="reward, held-out prompts")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _elements(row: Row) -> int:
    product = 1
    for size in row["shape"].split("x"):
        product *= int(size.partition("/")[0])  # 9/3: query heads, of which 3 share a key's
    return product

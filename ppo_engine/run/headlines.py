"""Which metrics a person is shown of a step, and how figures and their errors are written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table


@dataclass(frozen=True)
class Fact:
    """A metric in words; where there is no room for all, the highest `rank` goes first."""

    text: str
    rank: int


# In this order where present: metric (a pattern), label, format, rank.
_HEADLINES = (
    (r"objective/scores", "score", "{:+.3f}", 0),
    (r"rewards/(.+)/mean", r"\1", "{:+.3f}", 2),
    (r"objective/kl", "KL", "{:.3f}", 1),
    (r"objective/entropy", "entropy", "{:.2f}", 4),
    (r"objective/response_length", "tokens", "{:.0f}", 3),
    (r"cut", "cut", "{:.0%}", 1),
    (r"policy/clip_fraction", "ratio clipped", "{:.1%}", 5),
    (r"value/explained_variance", "explained variance", "{:+.2f}", 5),
    (r"sft/loss", "loss", "{:.4f}", 0),
    (r"eval/perplexity", "held-out perplexity", "{:.3f}", 0),
    (r"reward/loss", "loss", "{:.4f}", 0),
    (r"reward/accuracy", "accuracy", "{:.1%}", 1),
    (r"eval/accuracy", "held-out accuracy", "{:.1%}", 0),
    (r"eval/scores", "held-out score", "{:+.3f}", 0),
    (r"eval/best_of_(\d+)", r"best of \1", "{:+.3f}", 3),
    (r"eval/rewards/(.+)(?<!_se)", r"held-out \1", "{:+.3f}", 3),
    (r"eval/win_rate", "win rate", "{:.1%}", 2),
    (r"tokens_per_second", "tokens/s", "{:,.0f}", 4),
    (r"mfu/step", "MFU", "{:.0%}", 5),
)


def headlines(metrics: Mapping[str, float]) -> list[Fact]:
    """The metrics of a step that are shown, in their order."""
    shown = dict(metrics)
    if "objective/finished" in shown:
        shown["cut"] = 1 - shown["objective/finished"]
    found = []
    for pattern, label, form, rank in _HEADLINES:
        for name in shown:
            match = re.fullmatch(pattern, name)
            if match:
                figure = with_error(shown, name, form)
                found.append(Fact(f"{match.expand(label)} {figure}", rank))
    return found


def fitted(start: str, facts: Sequence[Fact], width: int) -> str:
    """One line of at most `width` columns: `start`, and those of the facts that fit, the least
    important left out first, the later of equals."""
    kept = list(facts)
    while kept and cell_len(start + "  ".join(fact.text for fact in kept)) > width:
        worst = max(fact.rank for fact in kept)
        kept.pop(max(i for i, fact in enumerate(kept) if fact.rank == worst))
    return start + "  ".join(fact.text for fact in kept)


def with_error(metrics: Mapping[str, float], name: str, form: str) -> str:
    """`metrics[name]` written as `form` has it, with its standard error where it has one."""
    value, error = form.format(metrics[name]), metrics.get(f"{name}_se", math.nan)
    return value if math.isnan(error) else f"{value} ± {form.format(error).lstrip('+')}"


def before_and_after(
    title: str,
    rows: Sequence[tuple[str, str, str]],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> Table:
    """A table of metrics, each `(label, name, format)`, with their standard errors where they have
    one; those that neither side has are left out."""
    table = Table(title=title, title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for label, name, form in rows:
        if name in before or name in after:
            sides = (before, after)
            table.add_row(
                label, *(with_error(side, name, form) if name in side else "" for side in sides)
            )
    return table

"""What the demo prints at its end: what VADER says, and answers side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_engine.run.headlines import with_error
from ppo_engine.run.progress import duration, printable

_SAMPLES = 3


@dataclass(frozen=True)
class Measurement:
    """Responses to held-out prompts, one each, measured. `_se` are standard errors of means."""

    vader: float  # compound score, -1 to 1
    vader_se: float
    reward: float  # the reward model's score
    reward_se: float
    win_rate: float  # of the reward model's scores, against the untrained model's responses
    win_rate_se: float
    kl: float  # to the reference, nats per response
    kl_se: float
    perplexity: float  # under the reference: low is fluent, as the reference sees it
    distinct: float  # share of different responses
    length: float  # tokens
    prompts: list[str]
    responses: list[str]
    sentiments: list[float]  # of the responses, by VADER


def show_result(
    console: Console, summary: dict[str, Any], before: Measurement, after: Measurement
) -> None:
    """Print the verdict and the samples, below the run's own table of figures."""
    told = [with_error(asdict(side), "vader", "{:+.3f}") for side in (before, after)]
    rise, error = summary["rise"], summary["rise_se"]
    console.print(
        f"VADER of these answers: {told[0]} before, {told[1]} after. It rose by {rise:+.3f}"
        + (f" ± {error:.3f}: {rise / error:.1f} standard errors." if error else ".")
    )
    console.print(
        f"Reward model: {with_error(summary, 'reward_accuracy', '{:.0%}')} of held-out rankings "
        f"right. Took {duration(summary['seconds'])} min, at most "
        f"{summary['peak_memory_gib']:.1f} GiB of memory."
    )

    samples = Table(title="Samples, not chosen", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        samples.add_column(name, ratio=1 if name == "prompt" else 2)
    for row in range(min(_SAMPLES, len(after.prompts))):
        shown = (after.prompts[row], before.responses[row], after.responses[row])
        samples.add_row(*(Text(" ".join(printable(cell).split())) for cell in shown))
    console.print()
    console.print(samples)

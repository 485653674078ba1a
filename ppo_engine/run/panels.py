"""What a run's curves are called, and what is drawn with them: of `report.png` and of the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A metric over the steps, with its error `band` and its `held_out` counterpart, if any."""

    metric: str
    title: str
    unit: str
    band: str = ""
    percent: bool = False
    held_out: str = ""
    level: float | None = None  # the level of chance


PANELS = (
    Panel("objective/scores", "Score", "mean ± SD of responses", band="objective/scores_std"),
    Panel("eval/scores", "Held-out score", "mean ± SE", band="eval/scores_se"),
    Panel(
        "eval/win_rate",
        "Held out: wins against the reference",
        "± SE",
        band="eval/win_rate_se",
        percent=True,
        level=0.5,
    ),
    Panel("objective/kl", "KL to the reference", "nats per response", held_out="eval/kl"),
    Panel("objective/entropy", "Entropy of the policy", "nats per token"),
    Panel("objective/response_length", "Response length", "tokens"),
    Panel("policy/loss", "Policy loss", "by ppo.reduction"),
    Panel("value/loss", "Value loss", "mean per token"),
    Panel("value/explained_variance", "Explained variance of the critic", "1 is perfect"),
    Panel("sft/loss", "Loss on responses", "nats per token"),
    Panel("eval/perplexity", "Held-out perplexity", "of response tokens"),
    Panel("reward/loss", "Preference loss", "nats per pair"),
    Panel("reward/accuracy", "Accuracy on training pairs", "of a batch", percent=True),
    Panel("eval/accuracy", "Held-out accuracy", "± SE", band="eval/accuracy_se", percent=True),
    Panel("reward/margin", "Score margin", "chosen minus rejected"),
)

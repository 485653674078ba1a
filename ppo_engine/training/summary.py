"""What a run says of itself: its size before the first step, what came of it at the end."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ppo_engine.data.rows import BadLines, read_jsonl
from ppo_engine.messages import counted
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.run.directory import RunDirectory
from ppo_engine.run.headlines import before_and_after
from ppo_engine.run.progress import Progress
from ppo_engine.run.signs import Watch

_FIRST_AND_LAST = 10  # steps at most, to be compared where nothing is held out
# Label, metric, format; the scores of several rewards come behind the first.
_OUTCOME = (
    ("score, mean ± SE", "eval/scores", "{:+.3f}"),
    ("scores above the reference's", "eval/win_rate", "{:.1%}"),
    ("KL to the reference, nats per response", "eval/kl", "{:.2f}"),
    ("perplexity under the reference", "eval/ref_perplexity", "{:.1f}"),
    ("distinct responses", "eval/distinct", "{:.0%}"),
    ("response length, tokens", "eval/response_length", "{:.1f}"),
    ("responses that end, not cut", "eval/finished", "{:.0%}"),
)


def size_of_ppo(engine: PPOEngine) -> str:
    """What decides how long a run of `engine` takes."""
    config, settings = engine.config, engine.config.ppo
    each = f"{counted(config.generation.max_new_tokens, 'token')} each"
    if engine.environment is not None:
        each = f"{counted(config.environment.max_turns, 'turn')} of {each}"
    trained = f"policy {trained_weights(engine.policy.model)}"
    if engine.critic is not None:
        trained += f", critic {trained_weights(engine.critic.model)}"
    return (
        f"{counted(config.steps, 'step')} of {counted(settings.rollout_batch_size, 'response')}, "
        f"at most {each}, {counted(settings.epochs, 'epoch')} over them in mini-batches of "
        f"{settings.mini_batch_size}; {where(engine.device, engine.dtype)}; weights that are "
        f"trained: {trained}."
    )


def where(device: torch.device, dtype: torch.dtype) -> str:
    return f"on {device} in {str(dtype).removeprefix('torch.')}"


def trained_weights(model: nn.Module) -> str:
    """Their number, such as "134.5 M"."""
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def tell_outcome(run: RunDirectory, held_out: int, watch: Watch, progress: Progress) -> None:
    """Held-out metrics before and after, or else the scores of the first and the last steps; then
    the signs that the run was pointless. `held_out` is the number of held-out prompts."""
    rows = logged_rows(run)
    evaluated = [row for row in rows if "eval/scores" in row]
    if held_out and len(evaluated) > 1:
        before, after = evaluated[0], evaluated[-1]
        when = "before training" if before["step"] == 0 else f"after step {before['step']}"
        title = f"{counted(held_out, 'held-out prompt')}, {when} and after step {after['step']}"
        progress.table(before_and_after(title, _outcome_rows(after), before, after))
    elif not held_out:
        for note in _training_scores([row for row in rows if "objective/scores" in row]):
            progress.note(note)
    for note in watch.summary([row for row in rows if row["step"] > 0]):
        progress.note(note)


def logged_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what was not finite."""
    return [
        {name: value for name, value in row.items() if value is not None}
        for _, row in read_jsonl(run.metrics_file, BadLines("skip"))
    ]


def _outcome_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    scores, *others = _OUTCOME
    found = [scores]
    for pattern, label in (
        (r"eval/rewards/(.+)(?<!_se)", r"\1"),
        (r"eval/best_of_(\d+)", r"best of \1"),
    ):
        for name in metrics:
            match = re.fullmatch(pattern, name)
            if match:
                found.append((f"  {match.expand(label)}", name, "{:+.3f}"))
    return found + others


def _training_scores(rows: Sequence[Mapping[str, float]]) -> list[str]:
    count = min(_FIRST_AND_LAST, len(rows) // 2)
    if count == 0:
        return []
    first, last = (
        statistics.fmean(row["objective/scores"] for row in part)
        for part in (rows[:count], rows[-count:])
    )
    steps = "step" if count == 1 else f"{count} steps"
    return [
        f"Score of training responses: {first:+.3f} in the first {steps}, {last:+.3f} in the last. "
        "The prompts differ from step to step: to measure what was learned, hold some out "
        "(evaluation.prompts=16)."
    ]

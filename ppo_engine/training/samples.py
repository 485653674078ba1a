"""Responses that people see: of the steps that log some, and of the held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ppo_engine.rollout.batch import Rollout
from ppo_engine.run.directory import RunDirectory
from ppo_engine.run.progress import Progress
from ppo_engine.run.trackers import Trackers
from ppo_engine.text.prompt import show_prompt

_LOGGED = 4  # of a step's responses, and of the held-out ones for trackers


def sample_rows(
    rollout: Rollout, rewards: Mapping[str, Tensor], scores: Tensor
) -> list[dict[str, Any]]:
    """Rows for samples.jsonl, of the first responses; each reward's scores are `[B]`, as are those
    of all rewards together."""
    return [
        {
            "prompt": rollout.prompts[i],
            "response": rollout.responses[i],
            "score": float(scores[i]),
            "rewards": {name: float(values[i]) for name, values in rewards.items()},
            "finished": bool(rollout.finished[i]),
        }
        for i in range(min(_LOGGED, len(rollout)))
    ]


def show_samples(
    step: int,
    samples: Sequence[dict[str, Any]],
    run: RunDirectory,
    trackers: Trackers,
    progress: Progress,
) -> None:
    """Write them, the first few for trackers too, and show the first of training and the first of
    the held-out prompts."""
    if samples:
        run.log_samples(step, samples)
    tracked = []
    when = f"of step {step}" if step else "before training"
    for name, held_out in (("sample", False), ("held-out sample", True)):
        found = [row for row in samples if row.get("held_out", False) == held_out]
        tracked += found[:_LOGGED]
        for row in found[:1]:
            progress.sample(
                show_prompt(row["prompt"]), row["response"], row["score"], f"{name} {when}"
            )
    if tracked:
        trackers.log_samples(step, tracked)

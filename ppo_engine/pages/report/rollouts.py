"""Recorded rollouts as the page has them: every token of some responses of some steps."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_engine.pages.report.texts import shown_prompt, shown_text
from ppo_engine.run.rollout_record import RolloutRecord, read_record, recorded_steps
from ppo_engine.sealed import Damaged

FIRST, NEWEST = 2, 4  # steps of a run on the page
TOKENS = 200_000  # of all rollouts of a page, some 8 MB
_NUMBERS = ("logprobs", "ref_logprobs", "values", "advantages", "returns", "ratio")


def rollouts(run: Path, samples: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    """The first and the newest rollouts that a run has recorded, with at most `tokens` tokens, of
    each as many responses as fit; without a record, what samples.jsonl has of those steps.

    `steps` are shown, `left_out` is the number of steps that are not, and `problems` says what
    could not be read.
    """
    folders = recorded_steps(run)
    if not folders:
        return _of_samples(samples)
    shown = _ends(list(folders))
    found, problems = [], []
    for step in shown:
        try:
            found.append(_rollout(read_record(folders[step]), tokens // len(shown)))
        except Damaged as error:
            problems.append(str(error))
    return {"steps": found, "left_out": len(folders) - len(shown), "problems": problems}


def _ends(steps: list[int]) -> list[int]:
    return steps if len(steps) <= FIRST + NEWEST else [*steps[:FIRST], *steps[-NEWEST:]]


def _rollout(record: RolloutRecord, most: int) -> dict[str, Any]:
    """The first responses of a record, with no more than `most` tokens but for one alone."""
    bounds = record.arrays["cu_seqlens"]
    count = max(1, int(np.searchsorted(bounds, most, side="right")) - 1)
    count = min(count, len(record))
    end = int(bounds[count])
    mask = record.arrays["mask"][:end]
    special = np.isin(record.arrays["tokens"][:end], record.special)
    packed = {"tokens": _packed(record.arrays["tokens"][:end], "<i4")}
    packed |= {name: _packed(record.arrays[name][:end], "<f4") for name in _NUMBERS
               if name in record.arrays}  # fmt: skip
    flags = {"own": mask, "special": special}
    if "clipped" in record.arrays:
        flags["clipped"] = record.arrays["clipped"][:end]
    packed |= {name: _packed(flag, "u1") for name, flag in flags.items()}
    return {
        "step": record.step,
        "method": record.method,
        "total": len(record),
        "clip_range": list(record.clip_range),
        "prompts": [shown_prompt(prompt) for prompt in record.prompts[:count]],
        "pieces": record.pieces[:count],
        "scores": _scores(record, count),
        "kl": _finite(record.kl[:count]) if "ref_logprobs" in record.arrays else None,
        "finished": record.finished[:count],
        "group": record.group[:count],
        "bounds": bounds[: count + 1].tolist(),
        "packed": packed,
    }


def _scores(record: RolloutRecord, count: int) -> dict[str, list[float | None]]:
    """By name: all together, what training made of them where that is something else, and each of
    several."""
    found = {"score": record.score}
    if record.shaped != record.score:
        found["shaped"] = record.shaped
    if len(record.rewards) > 1:
        found |= record.rewards
    return {name: _finite(values[:count]) for name, values in found.items()}


def _of_samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Responses without numbers of their tokens."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in samples:
        if not row.get("held_out") and "response" in row:
            by_step.setdefault(row["step"], []).append(row)
    shown = _ends(sorted(by_step))
    steps = [
        {
            "step": step,
            "total": len(by_step[step]),
            "prompts": [shown_prompt(row.get("prompt")) for row in by_step[step]],
            "texts": [shown_text(row["response"]) for row in by_step[step]],
            "scores": {"score": [row.get("score") for row in by_step[step]]},
            "finished": [row.get("finished") for row in by_step[step]],
        }
        for step in shown
    ]
    return {"steps": steps, "left_out": len(by_step) - len(shown), "problems": []}


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _packed(values: np.ndarray, kind: str) -> str:
    """The numbers as they lie in memory, which takes a page less room and time than digits."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()

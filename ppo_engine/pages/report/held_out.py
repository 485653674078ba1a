"""Answers to held-out prompts, before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_engine.pages.report.texts import shown_prompt, shown_text

PAIRS = 64  # prompts on the page


def before_and_after(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first and the newest answers to the held-out prompts of samples.jsonl; where there is one
    evaluation alone, the reference's and the policy's. None without any.

    `pairs` have `prompt`, and `before`, `after` with `text`, `score` and `finished`; `total` is the
    number of prompts, of which the page has at most `PAIRS`.
    """
    held_out = [row for row in samples if row.get("held_out")]
    if not held_out:
        return None
    steps = sorted({row["step"] for row in held_out})
    old = {_key(row): row for row in held_out if row["step"] == steps[0]}
    new = {_key(row): row for row in held_out if row["step"] == steps[-1]}
    alone = len(steps) == 1
    pairs = [
        {
            "prompt": shown_prompt(row.get("prompt")),
            "before": _reference(row) if alone else _answer(old[key]),
            "after": _answer(row),
        }
        for key, row in new.items()
        if alone or key in old
    ]
    return {
        "before": "the reference" if alone else _when(steps[0]),
        "after": _when(steps[-1]),
        "total": len(pairs),
        "pairs": pairs[:PAIRS],
    }


def _when(step: int) -> str:
    return f"after step {step}" if step else "before training"


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row.get("prompt"), sort_keys=True)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": shown_text(row.get("response", "")),
        "score": row.get("score"),
        "finished": row.get("finished"),
    }


def _reference(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": shown_text(row.get("reference_response", "")),
        "score": row.get("reference_score"),
        "finished": None,
    }

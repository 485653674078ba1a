"""A run's folder as the page of a run has it: what metrics.jsonl, config.yaml, samples.jsonl and
the recorded rollouts tell, and what looks wrong."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_engine.data.rows import BadLines, read_jsonl
from ppo_engine.errors import UserError
from ppo_engine.pages.report.curves import POINTS, curves
from ppo_engine.pages.report.held_out import before_and_after
from ppo_engine.pages.report.rollouts import rollouts
from ppo_engine.run.signs import findings, signs_of
from ppo_engine.settings.files import as_dict, flatten, load_config, shown_settings
from ppo_engine.settings.schema import PPOConfig, RewardModelConfig, SFTConfig

CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.jsonl", "samples.jsonl"


def collect(run: Path, tokens: int) -> dict[str, Any]:
    """All that the page shows of the run in a folder, going on, ended or dead: JSON without NaN.
    `tokens` bounds its rollouts. What cannot be read is among its `problems`."""
    problems: list[str] = []
    rows = _rows(run / METRICS, problems)
    samples = _rows(run / SAMPLES, problems)
    config = _config(run / CONFIG, problems)
    written = rollouts(run, samples, tokens)
    found = curves(rows)
    return {
        "name": str(run),
        "method": _method(config),
        "step": max((row["step"] for row in rows), default=0),
        "steps": config.steps if isinstance(config, PPOConfig) else None,
        "written": _written(run / METRICS),
        "thinned": POINTS if len(rows) > POINTS else None,
        "curves": found,
        "settings": flatten(shown_settings(as_dict(config))) if config is not None else {},
        "notes": _notes(config, rows),
        "problems": problems + written.pop("problems"),
        "held_out": before_and_after(samples),
        "rollouts": written,
    }


def _rows(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file or nothing in it yet. A run may be writing
    its last line just now, so that one is not missed."""
    if not file.is_file() or not file.stat().st_size:
        return []
    bad = BadLines("skip")
    try:
        rows = [row for _, row in read_jsonl(file, bad) if isinstance(row.get("step"), int)]
    except UserError as error:
        problems.append(str(error))
        return []
    if bad.skipped.total > 1:
        problems.append(f"{file.name}: {bad.skipped}.")
    return rows


def _config(file: Path, problems: list[str]) -> Any:
    """The settings of a run; None where they are not there or cannot be read."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    keys = {line.partition(":")[0] for line in text.splitlines()}
    kind: Any = PPOConfig if "ppo" in keys else SFTConfig if "sft" in keys else RewardModelConfig
    try:
        return load_config(kind, str(file))
    except UserError as error:
        problems.append(str(error))
        return None


def _method(config: Any) -> str:
    if isinstance(config, PPOConfig):
        return config.ppo.estimator
    return {SFTConfig: "sft", RewardModelConfig: "reward"}.get(type(config), "")


def _written(file: Path) -> str:
    """When the run last wrote metrics."""
    if not file.is_file():
        return ""
    return datetime.datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")


def _notes(config: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What looks wrong, what to try, and since when."""
    finite = [{name: x for name, x in row.items() if x is not None} for row in rows]
    before = next((row for row in finite if row["step"] == 0), {})
    of_training = [row for row in finite if row["step"] > 0]
    return [
        {
            "when": found.when,
            "what": found.sign.what,
            "advice": found.sign.advice,
            "shown": found.shown,
            "of": len(of_training),
            "lasts": found.lasts,
        }
        for found in findings(signs_of(config, before), of_training)
    ]

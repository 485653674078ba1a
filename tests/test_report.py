"""The picture of a run: drawn from whatever metrics there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from ppo_engine.errors import UserError
from ppo_engine.report import write_curves

PPO_ROW = {
    "objective/scores": 0.5,
    "objective/scores_std": 0.1,
    "objective/kl": 0.0,
    "value/explained_variance": None,
    "time/generate": 1.0,
}
REWARD_ROW = {"reward/loss": 0.69, "reward/accuracy": 0.5}
EVAL_ROW = {"eval/accuracy": 0.6, "eval/accuracy_se": 0.05}


@pytest.mark.parametrize(
    "rows",
    [
        [PPO_ROW],
        [PPO_ROW, {**PPO_ROW, "policy/loss": None}, {"objective/scores": 1.0}],
        [PPO_ROW] * 100,
        [REWARD_ROW, {**REWARD_ROW, **EVAL_ROW}],
        [EVAL_ROW, REWARD_ROW, {"eval/accuracy": 0.7}],
    ],
    ids=["one step", "gaps", "many steps", "reward model", "accuracy without its error"],
)
def test_curves_of_any_run(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps({"step": step, **row}) for step, row in enumerate(rows, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "torn')
    write_curves(tmp_path, tmp_path / "report.png", title="A run")
    picture = matplotlib.image.imread(tmp_path / "report.png")
    assert picture.std() > 0.05  # something is drawn on the white
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]


def test_run_without_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "other": 2.0}\n')
    with pytest.raises(UserError, match="no metrics to draw"):
        write_curves(tmp_path, tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()

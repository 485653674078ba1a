"""The plot of a run: drawn from whatever metrics there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from ppo_engine.errors import UserError
from ppo_engine.run.report import write_curves

PPO_ROW = {
    "objective/scores": 0.5,
    "objective/scores_std": 0.1,
    "objective/kl": 0.0,
    "value/explained_variance": None,
    "time/generate": 1.0,
    "mfu/generate": 0.1,
    "mfu/step": 0.3,
}
REWARD_ROW = {"reward/loss": 0.69, "reward/accuracy": 0.5}
ANTICIPATION = [f"value/anticipation_{percent}" for percent in range(10, 101, 10)]
EVALUATED_ROW = {
    "eval/scores": 1.0,
    "eval/scores_se": 0.1,
    "eval/win_rate": 0.6,
    "eval/win_rate_se": 0.1,
    "eval/kl": 0.2,
}
SFT_ROW = {"sft/loss": 2.0, "eval/perplexity": 7.4}
EVAL_ROW = {"eval/accuracy": 0.6, "eval/accuracy_se": 0.05}


@pytest.mark.parametrize(
    "rows",
    [
        [PPO_ROW],
        [PPO_ROW, {**PPO_ROW, "policy/loss": None}, {"objective/scores": 1.0}],
        [PPO_ROW] * 100,
        [REWARD_ROW, {**REWARD_ROW, **EVAL_ROW}],
        [EVALUATED_ROW | {ANTICIPATION[0]: 0.5}, {**PPO_ROW, ANTICIPATION[3]: None}],
        [EVAL_ROW, REWARD_ROW, {"eval/accuracy": 0.7}],
        [SFT_ROW, {"sft/loss": 1.0}],
    ],
    ids=[
        "one step",
        "gaps",
        "many steps",
        "reward model",
        "one evaluation",
        "accuracy without its error",
        "sft",
    ],
)
def test_curves_of_any_run(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps({"step": step, **row}) for step, row in enumerate(rows, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "torn')
    write_curves(tmp_path, tmp_path / "report.png", title="A run")
    picture = matplotlib.image.imread(tmp_path / "report.png")
    assert picture.std() > 0.05  # something is drawn on the white
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]


def test_pictures_of_an_evaluated_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's curves of the first and the last evaluation, its last points, and the others."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    curves = {0: [0.1] * 10, 5: [0.2] * 10, 10: [k / 10 for k in range(10)]}
    rows = [
        {"step": step, **EVALUATED_ROW, **dict(zip(ANTICIPATION, curve, strict=True))}
        for step, curve in curves.items()
    ] + [{"step": 7, **PPO_ROW}]
    points = [
        # null is a number that is not finite
        {"step": step, "read": 50, "values": [step, 2.0, 1.0], "scores": [1.0, 3.0, None]}
        for step in curves
    ]
    for name, lines in (("metrics", rows), ("critic", points)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_curves(tmp_path, tmp_path / "report.png")
    axes = {place.get_title(loc="left"): place for place in drawn[0].axes}
    lines = axes["Critic's value and the final score"].get_lines()
    assert [list(line.get_ydata()) for line in lines[:2]] == [curves[10], curves[0]]
    assert [line.get_label() for line in lines[:2]] == ["step 10", "step 0"]
    assert list(lines[0].get_xdata()) == list(range(10, 101, 10))
    scatter = axes["Critic at 50 % of the response"].collections[0]
    assert scatter.get_offsets().tolist() == [[1.0, 10.0], [3.0, 2.0]]
    assert "docs/metrics.md" in drawn[0].get_supxlabel()
    assert list(axes["Held-out score"].get_lines()[0].get_xdata()) == [0, 5, 10]
    assert axes["KL to the reference"].get_lines()[1].get_label() == "held out"
    assert "Held out: wins against the reference" in axes
    lines = axes["MFU"].get_lines()
    assert [line.get_label() for line in lines] == ["generate 10%", "step 30%"]
    assert [list(line.get_ydata()) for line in lines] == [[0.1], [0.3]]


def test_a_critic_of_whom_no_number_is_finite_has_an_empty_panel(tmp_path: Path) -> None:
    points = {"step": 1, "read": 50, "values": [None, 1.0], "scores": [0.5, None]}
    for name, row in (("metrics", {"step": 1, **PPO_ROW}), ("critic", points)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    write_curves(tmp_path, tmp_path / "report.png")
    assert (tmp_path / "report.png").exists()


def test_several_rewards_are_drawn_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    monkeypatch.setattr("ppo_engine.run.report.os.replace", lambda *_: None)
    rows = [
        {"step": step, **PPO_ROW, "rewards/a/mean": step, "rewards/b_c/mean": -step}
        for step in (1, 2)
    ] + [{"step": 0, "eval/rewards/a": 0.5, "eval/rewards/a_se": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_curves(tmp_path, tmp_path / "report.png")
    axes = {place.get_title(loc="left"): place for place in drawn[0].axes}
    assert [text.get_text() for text in axes["Each reward"].get_legend().get_texts()] == [
        "a",
        "b_c",
    ]
    lines = [list(line.get_ydata()) for line in axes["Each reward"].get_lines()]
    assert lines == [[1, 2], [0.5], [-1, -2], []]


def test_run_without_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "other": 2.0}\n')
    with pytest.raises(UserError, match="no metrics to draw"):
        write_curves(tmp_path, tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()

"""What a run of PPO says of its size, and of what came of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from tiny import tiny_model_folder
from trainers import PROMPTS, config, length_reward, rows

from ppo_engine import EvaluationConfig, PPOConfig, RewardConfig
from ppo_engine.run.directory import RunDirectory
from ppo_engine.run.progress import Progress
from ppo_engine.run.signs import Watch, ppo_signs
from ppo_engine.training.ppo import PPOTrainer
from ppo_engine.training.summary import tell_outcome

FIGURES = {"eval/scores": 0.5, "eval/scores_se": 0.25, "eval/kl": 0.0, "eval/finished": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def spaces(prompts: list[str], responses: list[str]) -> list[float]:
    return [-float(len(response)) for response in responses]


def cells(text: str) -> list[list[str]]:
    lines = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line] for line in lines]


def outcome(tmp_path: Path, logged: list[dict[str, Any]], held_out: int) -> str:
    out, file = io.StringIO(), tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in logged))
    run = cast(RunDirectory, SimpleNamespace(metrics_file=file))
    with Progress(1, "PPO", console=Console(file=out)) as progress:
        tell_outcome(run, held_out, Watch(ppo_signs(PPOConfig())), progress)
    return out.getvalue().partition("\n")[2]


def test_a_run_of_several_rewards_says_its_size_and_ends_with_before_and_after(
    model: str, tmp_path: Path
) -> None:
    out = io.StringIO()
    made = replace(
        config(tmp_path / "run"),
        reward=RewardConfig(weights=[1.0, 0.5]),
        evaluation=EvaluationConfig(prompts=3, best_of=2),
    )
    rewards = {"length": length_reward, "short": spaces}
    PPOTrainer(model, rewards, PROMPTS, config=made, console=Console(file=out)).train()
    shown = out.getvalue()
    size = (
        "2 steps of 4 responses, at most 6 tokens each, 1 epoch over them in mini-batches of 2; on "
        "cpu in float32; weights that are trained: policy 26,880, critic 26,912."
    )
    assert shown.index(size) < shown.index("step 1/2 |")
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    before, after = logged[0], logged[-1]
    for row in (before, after):
        total = row["eval/rewards/length"] + 0.5 * row["eval/rewards/short"]
        assert row["eval/scores"] == pytest.approx(total) and row["eval/rewards/short_se"] > 0
        assert f"  held-out short {row['eval/rewards/short']:+.3f} ± " in shown
        assert f"  best of 2 {row['eval/best_of_2']:+.3f}" in shown
    assert f"  short {after['rewards/short/mean']:+.3f}  KL" in shown
    assert "3 held-out prompts, before training and after step 2" in shown
    table = {label: sides for label, *sides in cells(shown)}
    assert list(table) == [
        "score, mean ± SE", "length", "short", "best of 2", "scores above the reference's",
        "KL to the reference, nats per response", "perplexity under the reference",
        "distinct responses", "response length, tokens", "responses that end, not cut",
    ]  # fmt: skip
    assert table["short"] == [
        f"{row['eval/rewards/short']:+.3f} ± {row['eval/rewards/short_se']:.3f}"
        for row in (before, after)
    ]


def test_one_reward_is_not_told_twice(model: str, tmp_path: Path) -> None:
    out = io.StringIO()
    made = replace(config(tmp_path / "run"), evaluation=EvaluationConfig(prompts=3))
    PPOTrainer(model, length_reward, PROMPTS, config=made, console=Console(file=out)).train()
    assert "length_reward" not in out.getvalue()
    assert not [name for name in rows(tmp_path / "run" / "metrics.jsonl")[0] if "rewards/" in name]


def test_the_table_is_of_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    logged = [
        {"step": 0, **FIGURES},
        {"step": 1, "objective/scores": 9.0},
        {"step": 2, **FIGURES, "eval/scores": 0.75},
        {"step": 3, **FIGURES, "eval/scores": 1.0, "eval/scores_se": None},  # not finite
    ]
    shown = outcome(tmp_path, logged, 5)
    assert "5 held-out prompts, before training and after step 3" in shown
    assert cells(shown)[0] == ["score, mean ± SE", "+0.500 ± 0.250", "+1.000"]
    assert outcome(tmp_path, logged[:1], 5) == ""  # nothing to compare with


def test_without_held_out_prompts_first_and_last_steps_are_compared(tmp_path: Path) -> None:
    def scored(*scores: float) -> str:
        logged = [{"step": i, "objective/scores": x} for i, x in enumerate(scores, start=1)]
        return outcome(tmp_path, logged, 0)

    shown = scored(1.0, 2.0, 9.0, 4.0, 5.0)
    assert shown.startswith(
        "Score of training responses: +1.500 in the first 2 steps, +4.500 in the last. The prompts "
        "differ from step to step"
    )
    assert "evaluation.prompts" in shown and "│" not in shown
    assert "+0.000 in the first step, +1.000 in the last." in scored(0.0, 0.5, 1.0)
    assert "+0.000 in the first 10 steps, +1.000" in scored(*[0.0] * 10, 0.5, *[1.0] * 10)
    assert scored(1.0) == ""


def test_what_was_pointless_is_said_again_at_the_end(tmp_path: Path) -> None:
    cut = {"objective/finished": 0.0}
    logged = [{"step": 0, **FIGURES, **cut}, {"step": 1, **cut}, {"step": 2}]
    assert "In 1 of 2 steps all 64 responses are cut" in outcome(tmp_path, logged, 5)

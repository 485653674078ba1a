"""docs/metrics.md names every metric that a command writes, and none besides."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_model_folder
from trainers import config, length_reward, planted_pairs, rows

from ppo_engine import (
    EvaluationConfig,
    PPOTrainer,
    RewardConfig,
    RewardModelConfig,
    RewardModelTrainer,
    RunConfig,
    SFTConfig,
    SFTTrainer,
)

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ALONE = {"tokens_per_second", "skipped_updates"}  # names without a `/`
PROMPTS = [f"Prompt {i}" for i in range(8)]


def named() -> set[str]:
    """The names of the page: code in the first cell of a table's row, where it has a `/` or is the
    one of the names without."""
    cells = re.findall(r"^\| (`.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`(.+?)`", cell)}
    return {name for name in names if "/" in name or name in ALONE}


def pattern(name: str) -> re.Pattern[str]:
    """`<name>` in a name of the page stands for anything without a `/`, `<n>` for a number."""
    escaped = re.escape(name).replace("<name>", "[^/]+").replace("<n>", r"\d+")
    return re.compile(escaped)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, no_pictures: None) -> set[str]:
    """The names in metrics.jsonl of runs that, together, write all there are."""
    path = tmp_path_factory.mktemp("runs")
    model = tiny_model_folder(path)
    pairs = planted_pairs(12)
    answers = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]

    def run(name: str) -> RunConfig:
        return RunConfig(output_dir=str(path / name), dtype="float32")

    SFTTrainer(model, answers, SFTConfig(run=run("sft"))).train()
    RewardModelTrainer(model, pairs, RewardModelConfig(run=run("reward"))).train()

    # PPO with two rewards, one of them a model, and all that an evaluation measures.
    both = {"length": length_reward, "kind": str(path / "reward" / "reward_model")}
    settings = replace(
        config(path / "ppo", ppo={"importance_cap": 2.0}),
        reward=RewardConfig(missing_eos_penalty=0.5),
        evaluation=EvaluationConfig(prompts=3, best_of=2),
        profile=True,
    )
    PPOTrainer(model, both, PROMPTS, config=settings).train()
    # Without a critic, the KL in the loss.
    grpo = {"estimator": "grpo", "group_size": 2, "kl_in": "loss"}
    settings = config(path / "grpo", ppo=grpo, on_bad_numbers="skip")
    PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
    return {name for file in path.glob("*/metrics.jsonl") for row in rows(file) for name in row}


def test_every_metric_is_on_the_page(written: set[str]) -> None:
    patterns = [pattern(name) for name in named()]
    assert {m for m in written - {"step"} if not any(p.fullmatch(m) for p in patterns)} == set()


def test_every_metric_of_the_page_is_written(written: set[str]) -> None:
    unwritten = {n for n in named() if not any(pattern(n).fullmatch(m) for m in written)}
    assert unwritten == set()

"""What each step of a PPO run asks, and what it leaves of it: prompts, columns, samples, counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model_folder

from ppo_engine.errors import UserError
from ppo_engine.rollout.batch import Rollout
from ppo_engine.run.state_file import load_state
from ppo_engine.settings.schema import (
    EvaluationConfig,
    GenerationConfig,
    PPOConfig,
    PPOSettings,
    PromptDataConfig,
    RunConfig,
)
from ppo_engine.training.ppo import PPOTrainer

ROWS = [{"prompt": f"Prompt {i}", "number": i} for i in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def config(output: Path | str = "", *, steps: int = 3, **run: Any) -> PPOConfig:
    batches = {"rollout_batch_size": 6, "mini_batch_size": 3, "micro_batch_size": 3}
    return PPOConfig(
        generation=GenerationConfig(max_new_tokens=5),
        ppo=PPOSettings(estimator="rloo", group_size=2, **batches),
        run=RunConfig(output_dir=str(output), dtype="float32", **run),
        steps=steps,
    )


def numbers(prompts: list[str], responses: list[str], number: list[int]) -> list[float]:
    return [n + len(r) / 10 for n, r in zip(number, responses, strict=True)]


def test_each_step_asks_its_own_batch_and_leaves_its_samples(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = PPOTrainer(model, numbers, ROWS, config=config(tmp_path / "run", sample_every=2))
    trainer.engine.policy.renderer.end_ids = list(
        range(220, 259)
    )  # some responses end, some are cut
    rollouts: list[Rollout] = []
    generate = trainer.engine.generate

    def spy(*args: Any, **kwargs: Any) -> Rollout:
        rollouts.append(generate(*args, **kwargs))
        return rollouts[-1]

    monkeypatch.setattr(trainer.engine, "generate", spy)
    trainer.train()
    for step, rollout in enumerate(rollouts):
        batch = [example for example in trainer.batch(step) for _ in range(2)]
        assert list(rollout.prompts) == [example.prompt for example in batch]
        assert rollout.columns == {"number": [example.columns["number"] for example in batch]}
    assert len({tuple(rollout.prompts) for rollout in rollouts}) == 3
    finished = [f for rollout in rollouts for f in rollout.finished.tolist()]
    assert True in finished and False in finished

    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").open()]
    expected = []
    for step in (0, 2):
        rollout = rollouts[step]
        scores = numbers([], list(rollout.responses), rollout.columns["number"])
        expected += [
            {
                "step": step + 1,
                "prompt": rollout.prompts[i],
                "response": rollout.responses[i],
                "score": pytest.approx(scores[i]),
                "rewards": {"numbers": pytest.approx(scores[i])},
                "finished": bool(rollout.finished[i]),
            }
            for i in range(4)
        ]
    assert samples == expected

    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    for row, rollout in zip(logged, rollouts, strict=True):
        tokens = int(rollout.mask.sum())
        assert row["objective/response_length"] == pytest.approx(tokens / 6)
        assert row["objective/finished"] == pytest.approx(float(rollout.finished.float().mean()))
        row.pop("time/record", None)  # comes after the step, and does not count
        timed = sum(value for name, value in row.items() if name.startswith("time/"))
        assert 0 < row["tokens_per_second"] * timed <= tokens * 1.001


def test_the_seed_says_in_which_order_prompts_come(model: str) -> None:
    def order(seed: int) -> list[str]:
        trainer = PPOTrainer(model, numbers, ROWS, config=config(seed=seed))
        return [str(example.prompt) for step in range(5) for example in trainer.batch(step)]

    orders = [order(seed) for seed in (0, 1, 2)]
    assert order(0) == orders[0]
    assert len({tuple(found) for found in orders}) == 3
    for found in orders:  # 5 batches of 3 prompts are 3 passes over 5
        for start in (0, 5, 10):
            assert sorted(found[start : start + 5]) == [row["prompt"] for row in ROWS]


def test_a_checkpoint_holds_what_it_was_made_of(model: str, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", steps=3, checkpoint_every=2)
    trainer = PPOTrainer(model, numbers, ROWS, config=settings)
    trainer.train()
    folders = sorted(folder.name for folder in (tmp_path / "run/checkpoints").iterdir())
    assert folders == ["step-000002", "step-000003"]
    for step in (2, 3):
        folder = tmp_path / f"run/checkpoints/step-{step:06d}"
        state = load_state(folder, torch.device("cpu"))
        assert state["step"] == state["engine"]["steps_done"] == step
        assert state["engine"]["policy_version"] == 2 * step
        assert state["engine"]["policy"]["scheduler"]["last_epoch"] == 2 * step
        assert {"python", "numpy", "torch"} <= state["random"].keys()
    for name, parameter in trainer.engine.policy.model.named_parameters():
        assert torch.equal(state["engine"]["policy"]["weights"][name], parameter)


def test_held_out_prompts_bring_their_columns(model: str, tmp_path: Path) -> None:
    file = tmp_path / "held_out.jsonl"
    held_out = [{"prompt": f"Held out {i}", "number": 10 * i} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    settings = replace(config(tmp_path / "run", steps=1), evaluation=EvaluationConfig(str(file)))
    PPOTrainer(model, numbers, ROWS, config=settings).train()
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").open()]
    rows = [row for row in rows if row.get("held_out")]
    for row, source in zip(rows, held_out * 2, strict=True):
        [score] = numbers([], [row["response"]], [source["number"]])
        assert row["score"] == pytest.approx(score)


def test_held_out_prompts_are_in_no_batch(model: str) -> None:
    settings = replace(config(), evaluation=EvaluationConfig(prompts=2))
    trainer = PPOTrainer(model, numbers, ROWS, config=settings)
    held_out = [example.prompt for example in trainer.evaluator.examples]
    asked = [example.prompt for step in range(5) for example in trainer.batch(step)]
    assert len(held_out) == 2 and len(set(asked)) == 3
    assert {*held_out, *asked} == {row["prompt"] for row in ROWS}


def test_long_held_out_prompts_are_refused_too(model: str, tmp_path: Path) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text(json.dumps({"prompt": "long " * 50}) + "\n")
    settings = replace(
        config(tmp_path / "run"),
        evaluation=EvaluationConfig(str(file)),
        data=PromptDataConfig(max_prompt_tokens=20),
    )
    with pytest.raises(UserError, match=r"held_out\.jsonl:1: prompt too long"):
        PPOTrainer(model, numbers, [row | {"prompt": "short"} for row in ROWS], config=settings)


def test_a_used_folder_is_refused_before_a_model_is_loaded(model: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        PPOTrainer("/no/such/model", numbers, ROWS, config=config(tmp_path))

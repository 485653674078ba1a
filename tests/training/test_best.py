"""What evaluations decide: when patience ends a run, and which policy is kept as the best."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_model_folder
from trainers import PROMPTS, as_if_killed, config, length_reward, rows, same, weights

from ppo_engine.run.progress import Progress
from ppo_engine.settings.schema import (
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
)
from ppo_engine.training.evaluation import Evaluation, Evaluator
from ppo_engine.training.ppo import PPOTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def settings_of(output: Path, *, steps: int, run: Any = (), **evaluation: Any) -> PPOConfig:
    """Of a policy that is the same after so many steps however many are to come."""
    trained = ModelConfig(optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"))
    return replace(
        config(output, steps=steps, **dict(run)),
        policy=trained,
        critic=trained,
        evaluation=EvaluationConfig(prompts=2, **evaluation),
    )


class Scripted(Evaluator):
    """Finds the scores of a list, one after the other."""

    scores = (0.0, 1.0, 3.0, 2.0, 3.0, 9.0, 9.0)  # of the steps; 3 again is no new best

    def evaluate(self, progress: Progress) -> Evaluation:
        done = self.engine.actor.version // 2  # two mini-batches a step
        return Evaluation({"eval/scores": self.scores[done]}, [], None)


@pytest.mark.parametrize("interrupted", [False, True])
def test_patience_ends_the_run_and_the_best_is_kept(model, tmp_path, monkeypatch, interrupted):
    monkeypatch.setattr("ppo_engine.training.ppo.Evaluator", Scripted)
    run, short, out = tmp_path / "run", tmp_path / "short", io.StringIO()
    settings = settings_of(run, steps=6, every=1, patience=2, run={"checkpoint_every": 3})
    if interrupted:
        with monkeypatch.context() as context:
            failing = {"steps": 0}

            def fail(trainer, *_):
                failing["steps"] += 1
                if failing["steps"] == 4:
                    raise RuntimeError("the power went off")
                return []

            context.setattr(PPOTrainer, "_samples", fail)
            with pytest.raises(RuntimeError, match="power"):
                PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
        settings = replace(settings, run=replace(settings.run, resume=True))
    trainer = PPOTrainer(
        model,
        length_reward,
        PROMPTS,
        config=settings,
        console=Console(file=out, force_terminal=False),
    )
    trainer.train()
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert "Stopped early, after 2 evaluations" in out.getvalue()
    assert (run / "checkpoints" / "step-000004").exists()
    assert json.loads((run / "best" / "best.json").read_text()) == {"step": 2, "score": 3.0}

    again = replace(settings, run=replace(settings.run, resume=True))
    PPOTrainer(model, length_reward, PROMPTS, config=again).train()
    assert len(rows(run / "metrics.jsonl")) == 5  # stopped is stopped

    PPOTrainer(model, length_reward, PROMPTS, config=settings_of(short, steps=2)).train()
    assert same(weights(run / "best"), weights(short / "policy"))
    assert not same(weights(run / "best"), weights(run / "policy"))

    patient = replace(again, evaluation=replace(again.evaluation, patience=3))
    PPOTrainer(model, length_reward, PROMPTS, config=patient).train()  # with more, it continues
    assert len(rows(run / "metrics.jsonl")) == 7
    assert json.loads((run / "best" / "best.json").read_text()) == {"step": 5, "score": 9.0}


def test_a_best_from_after_the_checkpoint_stays_the_one_to_beat(model, tmp_path, monkeypatch):
    """A run that crashed behind a new best, and whose repeat scores lower."""
    run = tmp_path / "run"
    settings = settings_of(run, steps=4, every=1, run={"checkpoint_every": 2})
    scripted = {0: 0.0, 1: 1.0, 2: 2.0, 3: 9.0}

    def evaluate(evaluator, progress):
        if evaluator.engine.steps_done == 4 and scripted[3] == 9.0:
            raise RuntimeError("the power went off")
        score = scripted.get(evaluator.engine.steps_done, 2.5)
        return Evaluation({"eval/scores": score}, [], None)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="power"):
        PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
    as_if_killed(run)
    scripted[3] = 2.4
    again = replace(settings, run=replace(settings.run, resume=True))
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=again)
    trainer.train()
    assert json.loads((run / "best" / "best.json").read_text()) == {"step": 3, "score": 9.0}
    assert "step 3, score +9.000; it is in best/" in trainer.evaluator.notes()[0]


def test_a_resumed_run_has_the_patience_of_an_undisturbed_one(model, tmp_path, monkeypatch):
    """Two new bests came after the checkpoint, of which the first, when it is repeated, is lower
    than what is in best/."""
    scores = {0: 5.0, 1: 4.0, 2: 3.0, 3: 6.0, 4: 7.0, 5: 1.0, 6: 1.0}

    def evaluate(evaluator, progress):
        return Evaluation({"eval/scores": scores[evaluator.engine.steps_done]}, [], None)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    keeping = {"checkpoint_every": 2, "keep_checkpoints": 0}
    settings = settings_of(tmp_path / "run", steps=6, every=1, patience=3, run=keeping)
    with monkeypatch.context() as context:
        context.setitem(scores, 5, None)  # it fails there
        with pytest.raises(TypeError):
            PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name != "step-000002":
            shutil.rmtree(folder)
    again = replace(settings, run=replace(settings.run, resume=True))
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=again)
    trainer.train()
    assert trainer.step == 6 and trainer.evaluator.since_best == 2
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert best == {"step": 4, "score": 7.0}


def test_a_score_that_is_not_finite_is_no_best(model, tmp_path, monkeypatch):
    scores = [float("nan"), 1.0, float("nan"), 0.5]

    def evaluate(evaluator, progress):
        return Evaluation({"eval/scores": scores[evaluator.engine.steps_done]}, [], None)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    settings = settings_of(tmp_path / "run", steps=3, every=1)
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=settings)
    trainer.train()
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert best == {"step": 1, "score": 1.0} and trainer.evaluator.since_best == 2


@pytest.mark.parametrize(("normalize", "best"), [(False, 1), (True, 2)])
def test_the_best_is_the_best_with_its_penalties(model, tmp_path, monkeypatch, normalize, best):
    """Where penalties and scores are of one scale."""
    scripted = iter([(0.0, 0.0), (1.0, 0.9), (2.0, 0.5)])

    def evaluate(*_):
        score, shaped = next(scripted)
        return Evaluation({"eval/scores": score, "eval/shaped_scores": shaped}, [], None)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    settings = settings_of(tmp_path / "run", steps=2, every=1)
    settings = replace(settings, reward=RewardConfig(normalize=normalize, missing_eos_penalty=0.5))
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=settings)
    trainer.train()
    assert trainer.evaluator.best_step == best


def test_nothing_is_kept_where_training_made_it_worse(model, tmp_path, monkeypatch):
    scores = iter([1.0, 0.5])
    monkeypatch.setattr(
        Evaluator, "evaluate", lambda *_: Evaluation({"eval/scores": next(scores)}, [], None)
    )
    trainer = PPOTrainer(
        model, length_reward, PROMPTS, config=settings_of(tmp_path / "run", steps=1)
    )
    trainer.train()
    assert not (tmp_path / "run" / "best").exists()
    [note] = trainer.evaluator.notes()
    assert note == "No evaluation was better than the one before training (score +1.000)."


def test_the_best_is_not_kept_where_it_is_not_wanted(model, tmp_path):
    settings = settings_of(tmp_path / "run", steps=1, keep_best=False)
    PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
    assert not (tmp_path / "run" / "best").exists()

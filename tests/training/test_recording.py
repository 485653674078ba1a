"""Which steps of a run are recorded, and that recording changes none of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_model_folder
from trainers import PROMPTS, as_if_killed, config, length_reward, rows, same, untimed, weights

from ppo_engine.errors import UserError
from ppo_engine.run.directory import RunDirectory
from ppo_engine.run.rollout_record import read_record, recorded_steps
from ppo_engine.settings.schema import PPOConfig
from ppo_engine.training import recording
from ppo_engine.training.ppo import PPOTrainer
from ppo_engine.training.recording import Recorder

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@dataclass
class Written:
    """A run of which nothing but records and checkpoints happens."""

    run: RunDirectory
    recorder: Recorder
    seconds: float = 0.0  # of the clock
    took: float = 0.0  # to write a record
    size: int = 10  # of one

    def step(self, number: int, checkpoint: bool = False, keep: int = 2) -> None:
        self.seconds += 1
        if self.recorder.is_due(self.run, number):
            self.recorder.write(self.run, number, None, {}, {})  # type: ignore[arg-type]
        if checkpoint:
            self.run.checkpoint(number).mkdir(parents=True)
            for _, folder in self.run.checkpoints()[keep:]:
                folder.rmdir()

    @property
    def steps(self) -> list[int]:
        return list(recorded_steps(self.run.path))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(steps: int, every: int | None = None) -> Written:
        settings = PPOConfig(steps=steps, run={"record_rollouts": every})  # type: ignore[arg-type]
        engine: Any = SimpleNamespace(config=settings)
        found = Written(
            RunDirectory(tmp_path / "run", settings), Recorder(engine, lambda: found.seconds)
        )

        def record(folder: Path, _: Any) -> None:
            found.seconds += found.took
            folder.mkdir(parents=True)
            (folder / "file").write_bytes(bytes(found.size))

        monkeypatch.setattr(recording, "write_record", record)
        monkeypatch.setattr(Recorder, "_record", lambda *_: None)
        return found

    return make


def test_by_default_a_few_over_the_run(written: Any) -> None:
    run = written(100)
    for step in range(1, 101):
        run.step(step)
    assert run.steps == [1, 25, 50, 75, 100]


@pytest.mark.parametrize(("steps", "expected"), [(1, [1]), (3, [1, 2, 3]), (6, [1, 2, 3, 5, 6])])
def test_of_a_short_run(written: Any, steps: int, expected: list[int]) -> None:
    run = written(steps)
    for step in range(1, steps + 1):
        run.step(step)
    assert run.steps == expected


def test_steps_that_a_checkpoint_replays_stay_as_long_as_it(written: Any) -> None:
    run = written(100)
    for step in range(1, 62):
        run.step(step, checkpoint=step % 10 == 0)
    assert run.steps == [1, 25, 50, 51, 61]  # 41 went with its checkpoint, 40


def test_what_follows_checkpoints_takes_little_time(written: Any) -> None:
    run = written(1000)
    run.took = 0.25  # seconds, of a step of 1
    recorded = set()
    for step in range(1, 200):
        run.step(step, checkpoint=True)
        recorded |= {*run.steps}
    assert sorted(recorded) == [1, 26, 51, 76, 101, 126, 151, 176]


@pytest.mark.parametrize(
    ("every", "expected"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7])]
)
def test_as_many_as_are_asked_for(written: Any, every: int, expected: list[int]) -> None:
    run = written(7, every)
    run.size = 60 << 20
    for step in range(1, 8):
        run.step(step, checkpoint=True)
    assert run.steps == expected and run.recorder.take_notes() == []


def test_they_are_bounded_in_size(written: Any) -> None:
    run = written(100)
    run.size = 20 << 20
    notes = []
    for step in range(1, 101):
        run.step(step, checkpoint=step == 60)
        notes += run.recorder.take_notes()
    # Those that can be replayed, and the newest.
    assert run.steps == [1, 61, 100]
    assert len(notes) == 3 and "record of 25 was removed" in notes[0] and "64 MiB" in notes[0]


def test_one_that_is_too_large_is_the_last(written: Any) -> None:
    run = written(100)
    run.size, run.took = 80 << 20, 5.0
    for step in range(1, 101):
        run.step(step)
    assert run.steps == [] and run.seconds == 105  # it was tried once
    [note] = run.recorder.take_notes()
    assert "of one is 80 MiB" in note and "run.record_rollouts=N" in note
    assert run.recorder.take_notes() == []


def test_what_a_run_records(model: str, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", steps=3, record_rollouts=2)
    PPOTrainer(model, {"length": length_reward}, PROMPTS, config=settings).train()
    found = recorded_steps(tmp_path / "run")
    assert list(found) == [1, 3]
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    for step, folder in found.items():
        record = read_record(folder)
        assert (record.step, record.method, len(record)) == (step, "PPO", 4)
        row = logged[step - 1]
        assert record.metrics == {name: row[name] for name in record.metrics}
        assert {"policy/loss", "value/loss", "objective/kl"} <= record.metrics.keys()
        assert row["time/record"] > 0
        assert record.score == pytest.approx([len(x) / 10 for x in record.responses])
        assert record.rewards == {"length": record.score}
        assert sum(record.shaped) / 4 == pytest.approx(row["objective/scores"], abs=1e-6)
    assert "time/record" not in logged[1]


def test_groups(model: str, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", steps=1, ppo={"estimator": "grpo", "group_size": 2})
    PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
    record = read_record(recorded_steps(tmp_path / "run")[1])
    assert record.group == [0, 0, 1, 1] and record.method == "GRPO"
    assert record.prompts[0] == record.prompts[1] != record.prompts[2]
    assert not {"values", "returns"} & record.arrays.keys()


@pytest.mark.parametrize("ppo", [{"epochs": 2}, {"estimator": "grpo", "group_size": 2}], ids=str)
def test_a_run_is_the_same_whether_it_is_recorded_or_not(
    model: str, tmp_path: Path, ppo: dict[str, Any]
) -> None:
    for name, every in (("with", 1), ("without", 0)):
        settings = config(tmp_path / name, steps=3, ppo=ppo, record_rollouts=every, sample_every=1)
        settings = replace(settings, policy=replace(settings.policy, trainable_layers=1))
        PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
    one, other = tmp_path / "with", tmp_path / "without"
    assert len(recorded_steps(one)) == 3 and not (other / "rollouts").exists()
    assert untimed(one / "metrics.jsonl") == untimed(other / "metrics.jsonl")
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    assert same(weights(one / "policy"), weights(other / "policy"))


def test_a_resumed_run_records_its_steps_again(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    calls = 0

    def failing(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 5:  # the first is a trial
            raise RuntimeError("the power went off")
        return length_reward(prompts, responses)

    settings = {"steps": 4, "checkpoint_every": 2, "record_rollouts": 1}
    with pytest.raises(UserError, match="power"):
        PPOTrainer(model, failing, PROMPTS, config=config(run, **settings)).train()
    as_if_killed(run)
    before = recorded_steps(run)
    assert list(before) == [1, 2, 3]
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=config(run, resume=True, **settings))
    trainer._restore(trainer._open_run())
    assert list(recorded_steps(run)) == [1, 2]  # what comes is recorded when it has come
    trainer._open_run().close()
    again = config(run, resume=True, **settings)
    PPOTrainer(model, length_reward, PROMPTS, config=again).train()
    assert list(recorded_steps(run)) == [1, 2, 3, 4]


def test_a_run_that_begins_anew_has_no_old_records(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"steps": 1, "record_rollouts": 1}
    PPOTrainer(model, length_reward, PROMPTS, config=config(run, **settings)).train()
    as_if_killed(run)
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=config(run, resume=True, **settings))
    trainer._restore(trainer._open_run())
    assert recorded_steps(run) == {}
    trainer._open_run().close()


def test_a_batch_that_is_left_out_is_not_recorded(model: str, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", record_rollouts=1, on_bad_numbers="skip")
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=settings)
    score, factors = trainer.engine.score_each, iter((float("nan"), 1.0))
    trainer.engine.score_each = lambda rollout: {  # type: ignore[method-assign]
        name: next(factors) * scores for name, scores in score(rollout).items()
    }
    trainer.train()
    assert list(recorded_steps(tmp_path / "run")) == [2]

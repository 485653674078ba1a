"""Trackers: what each is given, what a resumed run does, and that a failing one costs nothing.

TensorBoard is the real one. The other two are fakes with the real packages' signatures, which are
compared where those packages are installed.
"""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_model_folder
from trainers import PROMPTS, config, length_reward, rows

from ppo_engine import SFTTrainer
from ppo_engine.errors import UserError
from ppo_engine.run.directory import RunDirectory
from ppo_engine.run.trackers import Trackers, check_trackers
from ppo_engine.settings.files import flatten
from ppo_engine.settings.schema import (
    DemonstrationDataConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    SFTSettings,
)
from ppo_engine.training.ppo import PPOTrainer

SAMPLES = [
    {"prompt": "Say *hi* | <b>\nnow", "response": "a | `b`\n\n- c", "score": 0.123456},
    {"prompt": [{"role": "user", "content": "Chat?"}], "response": "", "extra": None},
]


class FakeTable:
    def __init__(
        self,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        allow_mixed_types: bool = False,
    ) -> None:
        self.columns, self.data = columns, data


class FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = 0
        self.broken = False

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        if self.broken:
            raise ConnectionError("the network went away\nand more")
        self.logged.append((step, data))

    def finish(self) -> None:
        self.finished += 1


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str) -> list[FakeRun]:
    """A module `name` with `init` and `Table`; returns the runs that it starts."""
    runs: list[FakeRun] = []

    def wandb_init(
        *, project: str, name: str, group: str, dir: str, config: dict[str, Any], reinit: str
    ) -> FakeRun:
        runs.append(FakeRun(project=project, name=name, group=group, dir=dir, config=config))
        return runs[-1]

    def trackio_init(*, project: str, name: str, group: str, config: dict[str, Any]) -> FakeRun:
        runs.append(FakeRun(project=project, name=name, group=group, config=config))
        return runs[-1]

    package: Any = types.ModuleType(name)
    package.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
    package.init = {"wandb": wandb_init, "trackio": trackio_init}[name]
    package.Table = FakeTable
    monkeypatch.setitem(sys.modules, name, package)
    return runs


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_fakes_take_what_the_real_packages_take(name: str) -> None:
    package = pytest.importorskip(name, reason=f"the optional group `{name}` is not installed")
    with pytest.MonkeyPatch.context() as patch:
        fake_package(patch, name)
        fake = sys.modules[name]
    for ours, theirs in (
        (fake.init, package.init),
        (FakeTable, package.Table),
        (FakeRun.finish, package.Run.finish),
    ):
        assert set(inspect.signature(ours).parameters) <= set(inspect.signature(theirs).parameters)
    assert (
        list(inspect.signature(package.Run.log).parameters)[2] == "step"
    )  # after self and the metrics


def test_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(UserError, match=rf"'{name}'.*pip install 'ppo-engine\[{name}\]'"):
            check_trackers([name])
    Trackers([], tmp_path, {}).log(1, {"x": 1.0})
    assert list(tmp_path.iterdir()) == []


def tensorboard_events(folder: Path) -> Any:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the optional group `tensorboard` is not installed",
    )
    return accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()


def test_tensorboard_gets_metrics_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the optional group `tensorboard` is not installed")
    trackers = Trackers(["tensorboard"], tmp_path, {})
    for step in (1, 2):
        trackers.log(step, {"objective/kl": step / 2})
    trackers.log_samples(2, SAMPLES)
    events = tensorboard_events(tmp_path)  # before `close`: a crash loses nothing
    assert [(e.step, e.value) for e in events.Scalars("objective/kl")] == [(1, 0.5), (2, 1.0)]
    [event] = events.Tensors("samples/text_summary")
    assert event.step == 2
    from tensorboard.plugin_util import markdown_to_safe_html

    page = markdown_to_safe_html(event.tensor_proto.string_val[0])
    assert page.count("<tr>") == 3 and page.count("<td>") == 10 and page.count("<th>") == 5
    assert "<b>" not in page and "<em>" not in page and "<li>" not in page and "<code>" not in page
    assert "Say &#42;hi&#42; &#124; &#60;b&#62;<br>now" in page and "Chat&#63;" in page
    trackers.close()


@pytest.mark.parametrize(
    ("start", "again", "expected"),
    [
        (2, {3: 30.0, 4: 40.0}, [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]),
        (0, {0: 5.0, 1: 10.0}, [(0, 5.0), (1, 10.0)]),
    ],
    ids=["from a checkpoint", "without one"],
)
def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(
    tmp_path: Path, start: int, again: dict[int, float], expected: list[tuple[int, float]]
) -> None:
    pytest.importorskip("tensorboard", reason="the optional group `tensorboard` is not installed")
    for begin, values in ((0, {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}), (start, again)):
        trackers = Trackers(["tensorboard"], tmp_path, {}, begin)
        for step, value in values.items():
            trackers.log(step, {"x": value})
        trackers.close()
    found = [(event.step, event.value) for event in tensorboard_events(tmp_path).Scalars("x")]
    assert found == expected


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_gets_settings_metrics_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runs = fake_package(monkeypatch, name)
    trackers = Trackers([name], tmp_path / "mine", {"ppo.kl_coef": 0.1})
    trackers.log(1, {"objective/kl": 0.5})
    trackers.log_samples(1, SAMPLES)
    trackers.close()
    Trackers([name], tmp_path / "mine", {}, 40)
    first, resumed = runs
    assert first.settings["config"] == {"ppo.kl_coef": 0.1} and first.finished == 1
    (step, metrics), (table_step, samples) = first.logged
    assert (step, metrics, table_step) == (1, {"objective/kl": 0.5}, 1)
    assert samples["samples"].columns == ["step", "prompt", "response", "score", "extra"]
    assert samples["samples"].data == [
        [1, "Say *hi* | <b>\nnow", "a | `b`\n\n- c", 0.123456, None],
        [1, "Chat?", "", None, None],
    ]
    # Steps go back: another run of the same group.
    assert first.settings["name"] == "mine" and resumed.settings["name"] == "mine from step 41"
    assert first.settings["group"] == resumed.settings["group"] == "mine"


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [broken] = [fake_package(monkeypatch, "wandb")]
    [healthy] = [fake_package(monkeypatch, "trackio")]
    trackers = Trackers(["wandb", "trackio"], tmp_path, {})
    broken[0].broken = True
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            trackers.log(step, {"x": 1.0})
        trackers.close()
    [record] = caplog.records
    assert "'wandb' failed (ConnectionError: the network went away)" in record.getMessage()
    assert "metrics.jsonl" in record.getMessage() and "and more" not in record.getMessage()
    assert [step for step, _ in healthy[0].logged] == [1, 2] and healthy[0].finished == 1


def test_a_tracker_that_cannot_start_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_package(monkeypatch, "wandb")

    def refuses(**settings: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuses)
    trackers = Trackers(["wandb"], tmp_path, {})
    trackers.log(1, {"x": 1.0})
    assert [("no API key" in record.getMessage()) for record in caplog.records] == [True]


def test_a_ppo_run_shows_its_samples_and_survives_its_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_package(monkeypatch, "trackio")
    model = tiny_model_folder(tmp_path)
    settings = config(tmp_path / "run", sample_every=1, checkpoint_every=1, trackers=["trackio"])
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=settings)
    checkpoint = trainer.checkpoints.save_if_due

    def breaks_after_a_step(*, last: bool) -> None:
        checkpoint(last=last)
        runs[0].broken = True

    monkeypatch.setattr(trainer.checkpoints, "save_if_due", breaks_after_a_step)
    trainer.train()
    assert ["memory/peak" in data for _, data in runs[0].logged] == [True, False]
    first = rows(tmp_path / "run" / "samples.jsonl")[0]
    assert runs[0].logged[1][1]["samples"].data[0] == list(flatten(first).values())
    assert "rewards.length_reward" in runs[0].logged[1][1]["samples"].columns
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]

    settings = config(tmp_path / "run", steps=3, resume=True, sample_every=1, trackers=["trackio"])
    PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
    assert runs[1].settings["name"] == "run from step 3"
    assert [step for step, _ in runs[1].logged] == [3, 3]


def test_supervised_training_shows_its_steps_from_0_on_and_closes_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_package(monkeypatch, "trackio")
    model = tiny_model_folder(tmp_path)

    def made(name: str) -> SFTTrainer:
        settings = SFTConfig(
            data=DemonstrationDataConfig(eval_fraction=0.25),
            sft=SFTSettings(batch_size=3),
            run=RunConfig(output_dir=str(tmp_path / name), device="cpu", trackers=["trackio"]),
        )
        examples = [{"prompt": f"Q{n}", "response": "yes"} for n in range(8)]
        return SFTTrainer(model, examples, settings, console=Console(file=io.StringIO()))

    made("whole").train()
    assert [step for step, _ in runs[0].logged] == [0, 1, 2] and runs[0].finished == 1
    assert "eval/loss" in runs[0].logged[0][1] and "sft/loss" in runs[0].logged[1][1]

    def fails(*_: Any) -> None:
        raise MemoryError

    killed = made("cut")
    monkeypatch.setattr(killed, "train_step", fails)
    with pytest.raises(MemoryError):
        killed.train()
    assert [step for step, _ in runs[1].logged] == [0] and runs[1].finished == 1


def test_trackers_and_a_resume_are_told_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_package(monkeypatch, "trackio")
    model = tiny_model_folder(tmp_path)
    settings = config(tmp_path / "run", trackers=["trackio"])
    reward = RewardConfig(url="http://127.0.0.1:1/score?secret")
    trainer = PPOTrainer(model, None, PROMPTS, config=replace(settings, reward=reward))
    run = trainer._open_run()
    trainer._open_trackers(run)
    assert runs[0].settings["config"]["reward.url"] == "http://127.0.0.1:1/score?…"
    other = replace(trainer.config, reward=RewardConfig(url="http://127.0.0.1:2/?secret"))
    with pytest.raises(UserError, match=r"reward\.url: .*:1/score.* then, .*:2/.* now") as caught:
        RunDirectory(run.path, other, resume=True)
    assert "secret" not in str(caught.value)


def test_a_run_that_fails_closes_its_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_package(monkeypatch, "trackio")
    settings = config(tmp_path / "run", trackers=["trackio"])
    trainer = PPOTrainer(tiny_model_folder(tmp_path), length_reward, PROMPTS, config=settings)

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(trainer.engine, "update", fails)
    with pytest.raises(MemoryError):
        trainer.train()
    assert runs[0].finished == 1

"""The run folder: nothing overwritten or half-written, and a resumed run continues its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppo_engine.errors import UserError
from ppo_engine.run.directory import RunDirectory, atomic_folder
from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import PPOConfig, RewardModelConfig


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_new_run_holds_its_resolved_settings(tmp_path: Path) -> None:
    config = load_config(PPOConfig, None, ["ppo.kl_coef=0.5"])
    run = RunDirectory(tmp_path / "deep" / "run", config)
    assert load_config(PPOConfig, str(run.path / "config.yaml")) == config
    assert run.newest_checkpoint() is None


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory("", RewardModelConfig(), command="reward")
    assert run.path.parent == Path("runs") and run.path.name.startswith("reward-2")


def test_metrics_and_samples_are_json_lines(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", PPOConfig())
    run.log_metrics(1, {"objective/kl": 0.5, "value/loss": float("nan")})
    run.log_metrics(2, {"objective/kl": 0.25, "value/loss": float("inf")})
    run.log_samples(1, [{"prompt": "ü\u2028", "response": "x\ny", "score": 1.0}])
    assert lines(run.metrics_file) == [
        {"step": 1, "objective/kl": 0.5, "value/loss": None},
        {"step": 2, "objective/kl": 0.25, "value/loss": None},
    ]
    assert lines(run.samples_file) == [
        {"step": 1, "prompt": "ü\u2028", "response": "x\ny", "score": 1.0}
    ]


def test_rewind_forgets_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", PPOConfig())
    for step in range(1, 5):
        run.log_metrics(step, {"x": step})
        run.log_samples(step, [{"a": "\u2028"}, {"a": 2}])
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 2, "x"')
    run.rewind(2)
    assert [line["step"] for line in lines(run.metrics_file)] == [1, 2]
    assert [line["step"] for line in lines(run.samples_file)] == [1, 1, 2, 2]
    run.log_metrics(3, {"x": 30})
    assert lines(run.metrics_file)[-1] == {"step": 3, "x": 30}


def test_rewind_forgets_a_line_without_its_end(tmp_path: Path) -> None:
    """To which the next one would be joined."""
    run = RunDirectory(tmp_path / "run", PPOConfig())
    run.metrics_file.write_text('{"step": 1}\n{"step": 2}')
    run.rewind(2)
    run.log_metrics(2, {})
    assert lines(run.metrics_file) == [{"step": 1}, {"step": 2}]


def test_folder_in_use_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty: choose another run\.output_dir") as caught:
        RunDirectory(tmp_path, PPOConfig())
    assert "resume" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "notes.txt", PPOConfig())
    RunDirectory(tmp_path / "run", PPOConfig())
    with pytest.raises(UserError, match=r"run\.resume=true"):
        RunDirectory(tmp_path / "run", PPOConfig())


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run", PPOConfig())


def test_resume_takes_up_the_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", PPOConfig())
    run.log_metrics(1, {"x": 1.0})
    for step in (2, 10):
        with atomic_folder(run.checkpoint(step)) as folder:
            (folder / "state").write_text(str(step))
    longer = load_config(
        PPOConfig,
        None,
        ["steps=500", "run.resume=true", "run.save_dtype=float32", "run.offload=[reward]"],
    )
    again = RunDirectory(run.path, longer, resume=True)
    assert again.newest_checkpoint() == (10, run.path / "checkpoints" / "step-000010")
    assert lines(again.metrics_file) == [{"step": 1, "x": 1.0}]
    assert load_config(PPOConfig, str(run.path / "config.yaml")).steps == 500


def test_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", PPOConfig())
    other = load_config(PPOConfig, None, ["ppo.kl_coef=0.5", "ppo.adaptive_kl.target=3"])
    with pytest.raises(UserError) as caught:
        RunDirectory(run.path, other, resume=True)
    text = str(caught.value)
    assert "ppo.kl_coef: 0.05 then, 0.5 now" in text
    assert "ppo.adaptive_kl.target: None then, 3.0 now" in text
    assert load_config(PPOConfig, str(run.path / "config.yaml")) == PPOConfig()


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to resume"):
        RunDirectory(tmp_path / "absent", PPOConfig(), resume=True)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(UserError, match=r"needs run\.output_dir"):
        RunDirectory("", PPOConfig(), resume=True)


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "step-000001"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []

    for content in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / "state").write_text(content)
            assert folder.parent == target.parent  # the rename stays on one file system
    assert [file.name for file in target.parent.iterdir()] == ["step-000001"]
    assert (target / "state").read_text() == "second"

    with pytest.raises(KeyboardInterrupt), atomic_folder(target):
        raise KeyboardInterrupt
    assert (target / "state").read_text() == "second"


def test_remains_of_a_killed_run_are_no_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", PPOConfig())
    with atomic_folder(run.checkpoint(1)):
        pass
    (run.path / "checkpoints" / ".step-000002.partial").mkdir()
    (run.path / "checkpoints" / "step-000003.bak").mkdir()
    assert run.newest_checkpoint() == (1, run.checkpoint(1))

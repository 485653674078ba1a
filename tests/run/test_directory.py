"""The run folder: nothing overwritten or half-written, and a resumed run continues its files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ppo_engine.errors import MachineError, UserError
from ppo_engine.run.directory import RunDirectory, atomic_folder
from ppo_engine.run.lock import Lock
from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import GRPOConfig, PPOConfig, RewardModelConfig, resolved


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_new_run_holds_its_settings(tmp_path: Path) -> None:
    config = load_config(PPOConfig, None, ["ppo.kl_coef=0.5"])
    run = RunDirectory(tmp_path / "deep" / "run", config)
    assert load_config(PPOConfig, str(run.path / "config.yaml")) == resolved(config)
    assert run.checkpoints() == []


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
    run.close()
    again = RunDirectory(run.path, longer, resume=True)
    folders = [run.path / "checkpoints" / name for name in ("step-000010", "step-000002")]
    assert again.checkpoints() == [*zip((10, 2), folders, strict=True)]
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
    assert load_config(PPOConfig, str(run.path / "config.yaml")) == resolved(PPOConfig())


def test_resume_takes_a_default_for_its_number(tmp_path: Path) -> None:
    """config.yaml has all numbers in it; another number is another run."""
    run = RunDirectory(tmp_path / "run", GRPOConfig())
    for same in (GRPOConfig(), resolved(GRPOConfig())):
        run.close()
        run = RunDirectory(run.path, same, resume=True)
    other = load_config(GRPOConfig, None, ["policy.lora.rank=4"])
    with pytest.raises(UserError, match=r"learning_rate: 1e-06 then, 0\.0001 now"):
        RunDirectory(run.path, other, resume=True)


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
    assert run.checkpoints() == [(1, run.checkpoint(1))]


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", PPOConfig())
    owner = f"in use by process {os.getpid()} on {socket.gethostname()}, since 2"
    with pytest.raises(UserError, match=owner):
        RunDirectory(run.path, PPOConfig(), resume=True)
    run.close()
    run.close()
    assert not (run.path / ".lock").exists()
    RunDirectory(run.path, PPOConfig(), resume=True).close()


def test_a_lock_that_was_removed_in_between_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def flock(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr("fcntl.flock", flock)
    Lock(tmp_path / ".lock", "It", "one")
    assert len(calls) == 2 and (tmp_path / ".lock").exists()


def test_a_killed_run_locks_nobody_out(tmp_path: Path) -> None:
    code = (
        "import os, sys; from ppo_engine.run.lock import Lock; from pathlib import Path\n"
        "lock = Lock(Path(sys.argv[1]) / '.lock', 'It', 'one')\n"
        "print('locked', flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert killed.stdout == "locked\n" and killed.returncode == -9, killed.stderr
    # Before it had written its settings: the folder is as good as free.
    (tmp_path / ".config.yaml.partial").touch()
    RunDirectory(tmp_path, PPOConfig()).close()


def test_without_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    locks = [Lock(tmp_path / ".lock", "It", "one") for _ in range(2)]
    assert [lock.held for lock in locks] == [False, False]
    run = RunDirectory(tmp_path / "run", PPOConfig())
    note = run.take_note()
    assert note is not None and f"The file system of {run.path} has no locks" in note
    assert run.take_note() is None


def test_what_the_machine_cannot_write_is_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", PPOConfig())
    shutil.rmtree(run.path)
    (tmp_path / "run").touch()  # as no permission would keep a superuser out
    for write in (lambda: run.log_metrics(1, {"x": 1.0}), lambda: enter(run.checkpoint(1))):
        with pytest.raises(MachineError, match="could not be written: Not a directory"):
            write()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    target = tmp_path / "step-000001"
    full = SafetensorError("Error while serializing: I/O error: No space left on device")
    for error in (OSError(errno.ENOSPC, "No space left on device"), full):
        with pytest.raises(MachineError, match=r"000001 could not be .* No space left on device"):
            enter(target, error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_is_the_machines_and_what_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    run = RunDirectory(tmp_path / "run", PPOConfig())
    run.log_metrics(1, {"x": 1.0})

    def fails(path: Path) -> None:
        raise OSError(code, "no room")

    monkeypatch.setattr("ppo_engine.run.directory.sync", fails)
    for use in (lambda: run.rewind(0), run.sync):
        with pytest.raises(MachineError, match=r"metrics\.jsonl could not be written: no room"):
            use()
    assert sorted(file.name for file in run.path.iterdir()) == [
        ".lock", "config.yaml", "metrics.jsonl",
    ]  # fmt: skip
    with pytest.raises(UserError, match="cannot be written: no room") as caught:
        RunDirectory(tmp_path / "other", PPOConfig())
    assert isinstance(caught.value, MachineError) == (code != errno.EACCES)


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    link, target = tmp_path / "best", tmp_path / "elsewhere" / "best"
    target.mkdir(parents=True)
    link.symlink_to(target)
    for name in ("one", "two", "three"):
        with atomic_folder(link) as folder:
            (folder / name).touch()
    assert link.is_symlink() and (target / "three").exists() and not (target / "two").exists()
    assert [path.name for path in target.parent.iterdir()] == ["best"]


def enter(folder: Path, error: Exception | None = None) -> None:
    with atomic_folder(folder) as inside:
        (inside / "half").touch()
        if error is not None:
            raise error

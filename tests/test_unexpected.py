"""Errors that nobody expected: one line, and a file with the traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model_folder

from ppo_engine.cli import main
from ppo_engine.errors import DEBUG_VARIABLE
from ppo_engine.training.sft import SFTTrainer


@pytest.fixture
def sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command; temporary files go into a folder of the test's."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}", "response": "b"}}\n' for n in range(8)))
    model = tiny_model_folder(tmp_path)
    output = str(tmp_path / "run")
    return [
        "sft",
        "--model",
        model,
        "--data",
        str(data),
        "--output-dir",
        output,
        "sft.batch_size=4",
    ]


def fails(*given: object) -> None:
    raise KeyError("not foreseen")


@pytest.mark.parametrize(("where", "folder"), [("_read", "temporary"), ("train_step", "run")])
def test_a_traceback_goes_to_a_file(sft, tmp_path, monkeypatch, capsys, where, folder) -> None:
    monkeypatch.setattr(SFTTrainer, where, fails)
    assert main(sft) == 1
    said = capsys.readouterr().err
    [file] = (tmp_path / folder).glob("traceback-*.txt")
    assert "error: KeyError: 'not foreseen'. This is not foreseen, and may be a bug" in said
    assert f"the traceback is in {file}." in said and "Traceback" not in said
    assert "in fails" in file.read_text()


def test_it_is_shown_where_that_is_asked_for(sft, monkeypatch) -> None:
    monkeypatch.setattr(SFTTrainer, "_read", fails)
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(KeyError):
        main(sft)


def test_python_sees_the_error_itself(sft, monkeypatch) -> None:
    monkeypatch.setattr(SFTTrainer, "_read", fails)
    with pytest.raises(KeyError):
        SFTTrainer(sft[2], [{"prompt": "a", "response": "b"}])


@pytest.mark.parametrize("broken", [True, False])
def test_a_message_that_nobody_reads_changes_no_status(sft, tmp_path, broken) -> None:
    """As of `2>&1 | tee log`, where Ctrl-C ends tee too."""
    reading, writing = os.pipe()
    if broken:
        os.close(reading)
    command = [sys.executable, "-P", "-m", "ppo_engine", *sft, "data.path=gone.jsonl"]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, stdout=writing, stderr=writing, env=os.environ | paths)
    os.close(writing)
    assert done.returncode == 2
    if not broken:
        assert b"gone.jsonl does not exist" in os.read(reading, 10_000)
        os.close(reading)


@pytest.mark.parametrize("key", ["data.path", "run.output_dir", "model.path", "data.eval_path"])
def test_a_name_that_is_too_long_is_the_users_mistake(sft, tmp_path, capsys, key) -> None:
    assert main([*sft, f"{key}={'n' * 300}"]) == 2
    assert "A name in the path 'nnnnn" in capsys.readouterr().err
    assert not [*(tmp_path / "temporary").iterdir()]

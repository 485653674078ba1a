"""The record of a step: the same when it is read again, and known to be damaged where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from ppo_engine.run.rollout_record import (
    RolloutRecord,
    UpdateState,
    read_record,
    recorded_steps,
    write_record,
)
from ppo_engine.sealed import SUMS, Damaged

UPDATE = UpdateState(
    policy_version=3,
    kl_coef=0.1,
    sampled=False,
    width=4,
    weights={"policy": "ab"},
    steps=9,
    pass_tokens=64,
    pass_rows=None,
    device="cpu",
    dtype="float32",
)
RECORD = RolloutRecord(
    step=2,
    method="PPO",
    prompts=["Hi\ud800", [{"role": "user", "content": "é"}]],
    responses=["ab", "c"],
    pieces=[["a", "b"], ["c"]],
    special=[],
    score=[0.1, float(np.float32(1 / 3))],
    rewards={"length": [0.1, 0.2]},
    shaped=[0.0, -0.0],
    kl=[1e-30, 3e38],
    finished=[True, False],
    group=[0, 0],
    clip_range=(0.2, 0.28),
    metrics={"policy/loss": 1 / 3, "value/loss": None},
    update=UPDATE,
    arrays={
        "tokens": np.array([1, 2, 3]),
        "cu_seqlens": np.array([0, 2, 3]),
        "prompt_tokens": np.array([7, 8, 9, 10]),
        "prompt_cu_seqlens": np.array([0, 1, 4]),
        "mask": np.array([True, False, True]),
        "logprobs": np.array([-1 / 3, np.nan, -0.0], np.float32),
    },
)


def test_it_is_what_was_written(tmp_path: Path) -> None:
    write_record(tmp_path / "step-000002", RECORD)
    found = read_record(tmp_path / "step-000002")
    for entry in fields(RECORD):
        if entry.name != "arrays":
            assert getattr(found, entry.name) == getattr(RECORD, entry.name), entry.name
    assert found.arrays.keys() == RECORD.arrays.keys()
    for name, array in RECORD.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].tobytes() == array.tobytes(), name


def test_the_tokens_of_one_response() -> None:
    assert len(RECORD) == 2
    assert RECORD.of("tokens", 0).tolist() == [1, 2]
    assert RECORD.of("mask", 1).tolist() == [True]
    assert RECORD.of("prompt_tokens", 1).tolist() == [8, 9, 10]


def test_which_steps_there_are(tmp_path: Path) -> None:
    assert recorded_steps(tmp_path) == {}
    for name in ("step-000011", "step-000002", ".step-000003.partial", "step-x"):
        (tmp_path / "rollouts" / name).mkdir(parents=True)
    found = recorded_steps(tmp_path)
    assert list(found) == [2, 11] and found[2] == tmp_path / "rollouts" / "step-000002"


def test_damage_is_noticed(tmp_path: Path) -> None:
    for number, name in enumerate(("rollout.json", "rollout.safetensors")):
        folder = tmp_path / str(number)
        write_record(folder, RECORD)
        file = folder / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(Damaged, match=name):
            read_record(folder)
        (folder / SUMS).unlink()
        file.write_bytes(content[:40])
        with pytest.raises(Damaged, match="does not hold a rollout"):
            read_record(folder)
        file.unlink()
        with pytest.raises(Damaged, match="No such file"):
            read_record(folder)


def test_of_another_version(tmp_path: Path) -> None:
    write_record(tmp_path / "x", RECORD)
    (tmp_path / "x" / SUMS).unlink()
    file = tmp_path / "x" / "rollout.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_later": 1}))
    with pytest.raises(Damaged, match="this version"):
        read_record(tmp_path / "x")


def test_what_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "x", replace(RECORD, kl=[float("nan"), 0.0]))
    assert not any(tmp_path.iterdir())


def test_it_is_read_without_torch() -> None:
    code = "import sys, ppo_engine.run.replayable; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

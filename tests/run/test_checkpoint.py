"""What a checkpoint holds, what it refuses, and what a damaged one says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from ppo_engine.errors import UserError
from ppo_engine.models.optimizer import load_trainable_state, trainable_state
from ppo_engine.run.checkpoint import (
    Checkpoints,
    load_training_state,
    random_states,
    restore_random_states,
    save_training_state,
)
from ppo_engine.run.directory import RunDirectory
from ppo_engine.settings.schema import RunConfig

CPU = torch.device("cpu")


def small_model(width: int = 3) -> nn.Sequential:
    """Two layers, of which the first is frozen."""
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))
    model[0].requires_grad_(False)
    return model


def test_trained_weights_alone_are_saved_and_copied_back(tmp_path: Path) -> None:
    one, two = small_model(), small_model()
    frozen = two[0].weight.clone()
    assert trainable_state(one).keys() == {"1.weight", "1.bias"}
    save_training_state(tmp_path, {"weights": trainable_state(one), "step": 3})
    state = load_training_state(tmp_path, CPU)
    assert state["step"] == 3
    load_trainable_state(two, state["weights"], {})
    assert torch.equal(one[1].weight, two[1].weight) and torch.equal(one[1].bias, two[1].bias)
    assert torch.equal(two[0].weight, frozen) and not torch.equal(two[0].weight, one[0].weight)


@pytest.mark.parametrize(
    "other",
    [
        small_model(width=4),  # other shapes
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)),  # other trained layers
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).requires_grad_(False),
    ],
)
def test_the_weights_of_another_model_are_refused(other: nn.Module) -> None:
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match="made by another model"):
        load_trainable_state(model, trainable_state(other), {})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(b"no checkpoint at all"),
    ],
    ids=["missing", "empty", "cut short", "something else"],
)
def test_a_damaged_checkpoint_says_what_to_do(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    save_training_state(tmp_path, {"weights": torch.zeros(1000)})
    damage(tmp_path / "training_state.pt")
    with pytest.raises(UserError, match=r"(?s)cannot be read .*: remove its folder"):
        load_training_state(tmp_path, CPU)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [4, 6, 8]),  # of those by time (3 and 6), the last one
        ({"checkpoint_every": 0}, [5, 8]),
        ({"checkpoint_minutes": 0}, [4, 8]),
        ({"checkpoint_minutes": 0.5}, [4, 7, 8]),
        ({"checkpoint_every": 1}, [*range(1, 9)]),
    ],
)
def test_checkpoints_by_steps_and_by_time(
    tmp_path: Path, settings: dict[str, float], kept: list[int]
) -> None:
    now = 1e6
    config = RunConfig(**({"checkpoint_every": 4} | settings))  # 30 minutes
    state = {"step": 0}
    checkpoints = Checkpoints(config, lambda: state, [], {}, "rows", clock=lambda: now)
    checkpoints.run = RunDirectory(tmp_path / "run", config)
    now += 60 * 60  # before the run
    with checkpoints.kept():
        for step in range(1, 9):
            now += 60 * (29.9 if step in (3, 5) else 1)
            state["step"] = step
            checkpoints.mark()
            checkpoints.save_if_due(last=step == 8)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"step-{step:06d}" for step in kept]
    assert load_training_state(folders[-2], CPU)["step"] == kept[-2]


def test_a_resumed_run_replaces_what_was_written_for_the_time(tmp_path: Path) -> None:
    times = iter([0, 0, 61, 61] * 2)
    config = RunConfig(checkpoint_minutes=1)
    state = {"step": 0}
    run = RunDirectory(tmp_path / "run", config)
    for step in (1, 2):  # each in a run of its own, which is killed
        checkpoints = Checkpoints(config, lambda: state, [], {}, "rows", lambda: next(times))
        checkpoints.run = run
        if step > 1:
            assert checkpoints.load(CPU) is not None
        with checkpoints.kept():
            state["step"] = step
            checkpoints.mark()
            checkpoints.save_if_due(last=False)
    assert [folder.name for folder in (run.path / "checkpoints").iterdir()] == ["step-000002"]


def test_nobody_is_told_to_run_what_a_file_holds(tmp_path: Path) -> None:
    """As torch's own message does."""
    torch.save({"code": small_model()}, tmp_path / "training_state.pt")
    with pytest.raises(UserError, match="cut short, damaged, or not written by a run") as caught:
        load_training_state(tmp_path, CPU)
    assert "weights_only" not in str(caught.value)


def test_random_states_go_through_a_file(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    save_training_state(tmp_path, {"random": random_states()})
    expected = drawn()
    for found, other in zip(drawn(), expected, strict=True):
        assert found != other
    restore_random_states(load_training_state(tmp_path, CPU)["random"])
    assert drawn() == expected

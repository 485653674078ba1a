"""What a checkpoint holds, what it refuses, and what a damaged one says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from ppo_engine.errors import UserError
from ppo_engine.models.optimizer import load_trainable_state, trainable_state
from ppo_engine.run.checkpoint import Checkpoints, random_states, restore_random_states
from ppo_engine.run.directory import RunDirectory
from ppo_engine.run.state_file import load_state, save_state
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
    save_state(tmp_path, {"weights": trainable_state(one), "step": 3})
    state = load_state(tmp_path, CPU)
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
    ("settings", "kept"),
    [
        ({}, [3, 4, 6, 8]),
        ({"checkpoint_every": 0}, [3, 5, 8]),
        ({"checkpoint_minutes": 0}, [4, 8]),
        ({"checkpoint_minutes": 0.5}, [*range(1, 9)]),
        ({"checkpoint_every": 1, "keep_checkpoints": 3}, [6, 7, 8]),
        ({"checkpoint_every": 1, "keep_checkpoints": 1}, [8]),
    ],
)
def test_checkpoints_by_steps_and_by_time(
    tmp_path: Path, settings: dict[str, float], kept: list[int]
) -> None:
    now = 1e6
    default = {"checkpoint_every": 4, "checkpoint_minutes": 30, "keep_checkpoints": 0}
    config = RunConfig(**(default | settings))
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
    assert load_state(folders[-1], CPU)["step"] == kept[-1]


def test_what_takes_long_to_write_is_not_due_as_often(tmp_path: Path) -> None:
    now = 0.0
    state = {"step": 0}
    config = RunConfig(checkpoint_minutes=1, keep_checkpoints=0)
    checkpoints = Checkpoints(config, lambda: state, [], {}, "rows", clock=lambda: now)
    checkpoints.run = run = RunDirectory(tmp_path / "run", config)

    class Slow(dict[str, int]):
        def items(self) -> Any:
            nonlocal now
            now += 30
            return super().items()

    with checkpoints.kept():
        for step in range(1, 31):
            now += 60
            state["step"] = step
            checkpoints.mark()
            checkpoints._state = Slow(checkpoints._state)
            checkpoints.save_if_due(last=False)
    # After 600 s, or 20 times as long as it took.
    assert [step for step, _ in run.checkpoints()] == [21, 11, 1]


def test_random_states_go_through_a_file(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    save_state(tmp_path, {"random": random_states()})
    expected = drawn()
    for found, other in zip(drawn(), expected, strict=True):
        assert found != other
    restore_random_states(load_state(tmp_path, CPU)["random"])
    assert drawn() == expected


def test_generators_of_gpus_that_are_gone_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    states = random_states() | {"cuda": [torch.zeros(1), torch.ones(1)]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.extend)
    restore_random_states(states)
    assert found == [torch.zeros(1)]


def run_of(tmp_path: Path, steps: int, **settings: int) -> Checkpoints:
    """A run with a checkpoint of each step, and a tensor that says which."""
    state: dict[str, Any] = {"step": 0}
    config = RunConfig(checkpoint_every=1, keep_checkpoints=0, **settings)
    checkpoints = Checkpoints(config, lambda: dict(state), [], {}, "rows")
    checkpoints.run = RunDirectory(tmp_path / "run", config)
    with checkpoints.kept():
        for step in range(1, steps + 1):
            state |= {"step": step, "weights": torch.full((1000,), float(step))}
            checkpoints.mark()
            checkpoints.save_if_due(last=False)
    return checkpoints


def flipped(file: Path, at: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path) -> None:
    checkpoints = run_of(tmp_path, 3)
    assert checkpoints.run is not None
    (newest, second, _) = (folder for _, folder in checkpoints.run.checkpoints())
    flipped(newest / "tensors-00001.safetensors", 500, 3)
    second.rename(newest.with_name("step-000009"))  # a number that is not its own
    found = checkpoints.load(CPU)
    assert found is not None and found["step"] == 1 and found["weights"].eq(1).all()
    first, later = checkpoints.notes
    assert first.endswith("step-000009 does not hold step 9 of a run.")
    assert "step-000003/tensors-00001.safetensors is damaged: " in later


def test_where_all_are_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    checkpoints = run_of(tmp_path, 2)
    assert checkpoints.run is not None
    for _, folder in checkpoints.run.checkpoints():
        (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"(?s)No checkpoint .* is whole.*000002.*000001"):
        checkpoints.load(CPU)


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path: Path) -> None:
    checkpoints = run_of(tmp_path, 4)
    run = checkpoints.run
    assert run is not None
    config = RunConfig(checkpoint_every=1, keep_checkpoints=1)
    again = Checkpoints(config, lambda: {"step": 2}, [], {}, "rows")
    again.run = run
    again.mark()
    again.save_if_due(last=False)
    assert [step for step, _ in run.checkpoints()] == [4, 3, 2]
    with pytest.raises(ValueError, match="fails") as caught, again.kept():
        again.mark()
        again._saved = True
        raise ValueError("it fails")
    assert caught.value.__notes__[0].startswith("Step 2 is kept in ")  # not the later ones


def test_the_lines_of_a_step_are_on_the_disk_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    checkpoints = run_of(tmp_path, 1)
    assert checkpoints.run is not None
    checkpoints.run.log_metrics(2, {"a": 1.0})
    monkeypatch.setattr("ppo_engine.run.directory.sync", lambda path: synced.append(path.name))
    with checkpoints.kept():
        checkpoints._measure = lambda: {"step": 2}
        checkpoints.mark()
        checkpoints.save_if_due(last=True)
    assert synced == ["metrics.jsonl", "checkpoints"]

"""A run that fails keeps its last finished step, and goes on from there as if it had not failed."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults._runs import STEPS, ppo, reward_model, sft
from rich.console import Console
from tiny import tiny_model_folder
from trainers import rows, same, untimed, weights

from ppo_engine.errors import Stopped, UserError
from ppo_engine.models.reader import Limit
from ppo_engine.run.state_file import save_state
from ppo_engine.training.samples import show_samples

pytestmark = pytest.mark.usefixtures("no_pictures")


class Failing:
    """What `function` does, until its call of number `at` (from 1) raises `error`."""

    def __init__(self, function: Callable[..., Any], at: int, error: type[BaseException]) -> None:
        self.function, self.left, self.error = function, at, error

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            random.random(), torch.rand(3)  # what a step draws before it fails
            raise self.error("failed")
        return self.function(*given, **named)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def handled() -> Iterator[Callable[[int, Any], None]]:
    """Sets a signal's handler for the test."""
    before: dict[int, Any] = {}

    def handle(number: int, handler: Any) -> None:
        before[number] = signal.signal(number, handler)

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


def fails(trainer: Any, path: str, at: int, error: type[BaseException]) -> Failing:
    """Call number `at` of the function at `path` within the trainer raises `error`."""
    *owners, name = path.split(".")
    for owner in owners:
        trainer = getattr(trainer, owner)
    failing = Failing(getattr(trainer, name), at, error)
    setattr(trainer, name, failing)
    return failing


OUT_OF_MEMORY = torch.OutOfMemoryError  # in a pass of several rows nothing fails of it


@pytest.mark.parametrize(
    ("make", "path", "at", "error", "kept"),
    [
        (ppo, "engine.score_each", 6, UserError, 2),
        (ppo, "engine.generate", 4, KeyboardInterrupt, 3),
        (ppo, "engine.policy.policy_loss", 5, OSError, 2),  # of two passes in a step
        (ppo, "engine.compare_with_reference", 2, OUT_OF_MEMORY, 2),  # of the evaluation of step 2
        (ppo, "evaluator.evaluate", 3, UserError, STEPS),  # after the last step
        (ppo, "evaluator.keep", 2, OSError, 2),
        # When step 2 is logged, and the best is kept.
        (ppo, "ppo_engine.training.ppo.show_samples", 3, OSError, 2),
        (sft, "policy.nll_loss", 3, OSError, 2),
        (sft, "evaluate", 2, OUT_OF_MEMORY, STEPS),
        (reward_model, "learner.step", 2, UserError, 1),
        (reward_model, "evaluate", 2, KeyboardInterrupt, STEPS),
    ],
)
def test_the_last_step_is_kept_and_goes_on_to_the_same_bits(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    make: Any, path: str, at: int, error: type[BaseException], kept: int,
) -> None:  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = make(model, whole)
    expected.train()
    failing = make(model, cut)
    if path.startswith("ppo_engine."):
        monkeypatch.setattr(path, Failing(show_samples, at, error))
    else:
        fails(failing, path, at, error)
    with pytest.raises(error) as caught:
        failing.train()
    [note] = caught.value.__notes__
    assert f"Step {kept} is kept in {cut}/checkpoints/step-{kept:06d}.\n" in note
    assert f"run.output_dir={cut} run.resume=true" in note
    torch.manual_seed(99)  # another process would stand elsewhere
    resumed = make(model, cut, resume=True)
    resumed.train()
    assert untimed(cut / "metrics.jsonl") == untimed(whole / "metrics.jsonl")
    for name in {file.name for file in whole.iterdir()} & {"policy", "critic", "reward_model"}:
        assert same(weights(cut / name), weights(whole / name))
    for name in ("samples.jsonl", "critic.jsonl", "best/best.json") if make is ppo else ():
        assert (cut / name).read_text() == (whole / name).read_text()
        assert resumed.evaluator.state_dict() == expected.evaluator.state_dict()


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_half_an_update_is_not_kept(model: str, tmp_path: Path, checkpoint_every: int) -> None:
    trainer = ppo(model, tmp_path / "run", checkpoint_every=checkpoint_every)
    fails(trainer, "engine.actor.learner.step", 6, OUT_OF_MEMORY)  # of two in a step, in the third
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    [note] = caught.value.__notes__
    assert note.startswith("Step 3 had begun to change the weights, which cannot be undone.\n")
    ending = "Step 2 is kept in " if checkpoint_every else "Nothing is kept; with run.checkpoint_"
    assert note.partition("undone.\n")[2].startswith(ending)
    kept = ["step-000002"] * bool(checkpoint_every)
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoints/*")] == kept


def test_nothing_is_said_before_there_is_a_step(model: str, tmp_path: Path) -> None:
    trainer = ppo(model, tmp_path / "run")
    fails(trainer, "engine.generate", 1, UserError)
    with pytest.raises(UserError) as caught:
        trainer.train()
    assert not hasattr(caught.value, "__notes__")
    assert not (tmp_path / "run/checkpoints").exists()


def test_where_it_cannot_be_kept_the_failure_itself_is_shown(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = sft(model, tmp_path / "run")
    fails(trainer, "policy.nll_loss", 3, KeyError)
    monkeypatch.setattr("ppo_engine.run.checkpoint.save_state", full)
    with pytest.raises(KeyError) as caught:
        trainer.train()
    [note] = caught.value.__notes__
    assert "could not be written: No space left on device).\nNothing is kept" in note
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped), (signal.SIGHUP, Stopped)],
)
@pytest.mark.parametrize(
    ("make", "path", "at", "kept"),
    [
        (ppo, "engine.critic.learner.step", 4, 2),  # between two mini-batches of step 2
        (sft, "learner.optimizer.step", 2, 2),
        (sft, "learner.step", 2, 1),  # no weight has changed yet
        (ppo, "engine.estimate_advantages", 3, 2),
    ],
)
def test_a_signal_waits_for_the_weights(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], handled: Any,
    make: Any, path: str, at: int, kept: int, number: int, error: type[BaseException],
) -> None:  # fmt: skip
    trainer = make(model, tmp_path / "run")
    calls = []
    *owners, name = path.split(".")
    owner: Any = trainer
    for attribute in owners:
        owner = getattr(owner, attribute)
    function = getattr(owner, name)

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return function(*given, **named)

    setattr(owner, name, interrupted)
    if number != signal.SIGINT:  # whoever runs the tests may ignore it, as nohup does
        handled(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with pytest.raises(error) as caught:
        trainer.train()
    assert f"Step {kept} is kept" in caught.value.__notes__[0]
    assert ("this step is finished first" in capfd.readouterr().err) == (kept == at or at == 4)
    assert signal.getsignal(number) is (signal.SIG_IGN if number == signal.SIGHUP else before)
    resumed = make(model, tmp_path / "run", resume=True)
    resumed.train()
    steps = [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")]
    assert steps == [*range(steps[0], STEPS + 1)]


def test_a_signal_while_a_reward_function_runs_is_not_its_failure(
    model: str, tmp_path: Path, handled: Any
) -> None:
    handled(signal.SIGTERM, signal.SIG_DFL)
    calls = []

    def killed(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return [1.0] * len(responses)

    with pytest.raises(Stopped) as caught:
        ppo(model, tmp_path / "run", reward=killed).train()
    assert "is kept in" in caught.value.__notes__[0]


def test_a_second_signal_does_not_wait(model: str, tmp_path: Path, handled: Any) -> None:
    handled(signal.SIGTERM, signal.SIG_DFL)
    trainer = ppo(model, tmp_path / "run")
    step = trainer.engine.actor.learner.optimizer.step

    def interrupted(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        step(*given)

    trainer.engine.actor.learner.optimizer.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 0
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == [0]


@pytest.mark.parametrize("where", ["actor.learner.optimizer.step", "estimate_advantages"])
def test_a_second_hangup_says_nothing_new(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handled: Any, where: str
) -> None:
    """Whoever closes a terminal sends one by the shell and one by the kernel; the second may come
    while the step is finished, or while it is saved."""
    handled(signal.SIGHUP, signal.SIG_DFL)
    trainer = ppo(model, tmp_path / "run")
    *owners, name = where.split(".")
    owner: Any = trainer.engine
    for attribute in owners:
        owner = getattr(owner, attribute)
    function, calls = getattr(owner, name), []

    def hung_up(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # in step 2
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        return function(*given, **named)

    def saved(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        save_state(*given)

    setattr(owner, name, hung_up)
    monkeypatch.setattr("ppo_engine.run.checkpoint.save_state", saved)
    with pytest.raises(Stopped) as caught:
        trainer.train()
    assert "Step 2 is kept in " in caught.value.__notes__[0]


def test_ctrl_c_that_ended_the_reader_of_a_pipe_too(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `2>&1 | tee log`."""
    trainer = ppo(model, tmp_path / "run")
    optimizer = trainer.engine.actor.learner.optimizer
    step = optimizer.step
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(*given: Any) -> None:
        monkeypatch.setattr(optimizer, "step", step)
        os.kill(os.getpid(), signal.SIGINT)
        step(*given)

    def broken(*_: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(optimizer, "step", interrupted)
    monkeypatch.setattr("ppo_engine.run.interrupts.os.write", broken)
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert "Step 1 is kept in " in caught.value.__notes__[0]


@pytest.mark.parametrize(("seconds", "waits"), [(3, True), (4, False)])
def test_a_signal_does_not_wait_for_a_long_update(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], handled: Any,
    seconds: float, waits: bool,
) -> None:  # fmt: skip
    """After the first of four optimizer steps three are left: 9 seconds, or 12."""
    handled(signal.SIGTERM, signal.SIG_DFL)
    ppo(model, tmp_path / "whole").train()
    trainer = ppo(model, tmp_path / "run", checkpoint_every=1)
    now, calls = [0.0], []
    trainer.checkpoints._clock = lambda: now[0]
    learner = trainer.engine.actor.learner
    step = learner.step

    def slow(*given: Any) -> Any:
        now[0] += seconds
        calls.append(1)
        found = step(*given)
        if len(calls) == 3:  # of two in a step, in the second
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    learner.step = slow  # type: ignore[method-assign]
    with pytest.raises(Stopped) as caught:
        trainer.train()
    [note] = caught.value.__notes__
    assert (len(calls), trainer.step) == ((4, 2) if waits else (3, 1))
    assert ("this step is finished first" in capfd.readouterr().err) == waits
    assert note.startswith("Step 2 is kept in " if waits else "Step 2 had begun to change")
    assert (". What came after it, 0:04, is to be redone.\nThe same run" in note) != waits
    ppo(model, tmp_path / "run", resume=True).train()
    assert untimed(tmp_path / "run/metrics.jsonl") == untimed(tmp_path / "whole/metrics.jsonl")


def test_ignored_signals_stay_ignored(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handled: Any
) -> None:
    """As under nohup."""
    handled(signal.SIGHUP, signal.SIG_IGN)
    trainer = sft(model, tmp_path / "run")
    evaluate = trainer.evaluate
    hung_up = lambda *given: (os.kill(os.getpid(), signal.SIGHUP), evaluate(*given))[1]  # noqa: E731
    monkeypatch.setattr(trainer, "evaluate", hung_up)
    trainer.train()
    assert trainer.step == STEPS


@pytest.mark.parametrize("make", [ppo, sft])
def test_a_file_system_without_locks_is_told_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    trainer = make(model, tmp_path / "run")
    trainer.train()
    assert trainer.console.file.getvalue().count("/run has no locks") == 1


def test_a_run_goes_on_with_smaller_micro_batches(model: str, tmp_path: Path) -> None:
    """After one that was out of memory with each row alone."""
    trainer = sft(model, tmp_path / "run")
    trainer.budget.limit = Limit(1)
    fails(trainer, "policy.nll_loss", 3, OUT_OF_MEMORY)
    with pytest.raises(UserError, match=r"one row of .* Lower data.max_tokens"):
        trainer.train()
    again = sft(model, tmp_path / "run", resume=True)
    again.config = replace(again.config, sft=replace(again.config.sft, micro_batch_size=1))
    again.train()
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == list(range(STEPS + 1))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (sft, "policy.nll"),
        (sft, "backward"),
        (reward_model, "_forward"),
        (reward_model, "backward"),
    ],
)
def test_a_pass_without_memory_is_divided_and_said_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, path: str
) -> None:
    """The first one of all; a run with the smaller budget from the start has the same bits."""
    trainer, other = make(model, tmp_path / "cut"), make(model, tmp_path / "whole")
    told = io.StringIO()
    trainer.console = Console(file=told, width=1000)
    if path == "backward":
        backward, left = torch.Tensor.backward, [OUT_OF_MEMORY]

        def failing(loss: torch.Tensor) -> None:
            backward(loss)  # the gradients are there
            if left:
                raise left.pop()

        monkeypatch.setattr(torch.Tensor, "backward", failing)
    else:
        fails(trainer, path, 1, OUT_OF_MEMORY)
    trainer.train()
    other.budget.limit = trainer.budget.limit
    other.train()
    cut, whole = (untimed(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole"))
    # Before its first gradient memory had not run out: that evaluation had larger passes.
    assert cut[path == "backward" :] == whole[path == "backward" :]
    tokens = trainer.budget.limit.tokens
    assert rows(tmp_path / "cut/metrics.jsonl")[1]["memory/pass_tokens"] == tokens < 2048
    assert told.getvalue().count("Memory ran out in a pass of ") == 1
    assert f"Set {trainer.command}.micro_batch_tokens={tokens} " in told.getvalue()

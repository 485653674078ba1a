"""What a run needs to resume as if it had never stopped, and when it is written: every few steps,
where that takes long in between, and when the run fails.

A checkpoint holds the *trained* weights (frozen ones are loaded from the model's folder again), the
optimizers and schedulers, and the states of every source of randomness.
"""

from __future__ import annotations

import random
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import set_seed

from ppo_engine.data.digest import changed_data
from ppo_engine.errors import UserError, note_folder
from ppo_engine.messages import first_line
from ppo_engine.models.optimizer import Learner
from ppo_engine.run.directory import RunDirectory, atomic_folder
from ppo_engine.run.interrupts import interrupted_after, stopped_by_signals
from ppo_engine.run.progress import duration
from ppo_engine.run.state_file import load_state, save_state
from ppo_engine.sealed import Damaged
from ppo_engine.settings.schema import RunConfig

_LONGEST_SHARE = 0.05  # of the time, for checkpoints that are due by time


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators."""
    generator: Any = numpy.random.get_state(legacy=False)
    generator["state"]["key"] = generator["state"]["key"].tolist()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": generator,
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        there = states["cuda"][: torch.cuda.device_count()]  # there may be fewer by now
        torch.cuda.set_rng_state_all([state.cpu() for state in there])


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Seed all global generators from `name`, and restore their states afterwards."""
    states = random_states()
    set_seed(random.Random(name).getrandbits(32))
    try:
        yield
    finally:
        restore_random_states(states)


class Checkpoints:
    """The checkpoints of a run: `mark` the end of each step, `save_if_due` some of them; in the
    context of `kept`, the last one is saved when the next one fails. The newest
    `run.keep_checkpoints` stay.

    Args:
        config: how often they are written.
        measure: the trainer's state, with the key `step`. Its tensors may be the models' own: it is
            written only while no optimizer has moved on.
        learners: the optimizers that could.
        data: what the run learns from and is measured on, as `describe_rows` has it.
        unit: what its rows are called.
    """

    run: RunDirectory | None = None  # set as soon as there is one

    def __init__(
        self,
        config: RunConfig,
        measure: Callable[[], dict[str, Any]],
        learners: Sequence[Learner],
        data: Mapping[str, str],
        unit: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._clock = config, clock
        self._last = clock()  # when one was written, or the run began
        self._took = 0.0  # seconds, to write it
        self.notes: list[str] = []  # on those that were not whole
        self._measure, self._learners = measure, list(learners)
        self._data, self._unit = dict(data), unit
        self._state: dict[str, Any] = {}
        self._begun = 0
        self._saved = False

    def mark(self) -> None:
        """Remember where the run stands, random states included: a step may end here."""
        self._state = {**self._measure(), "data": self._data, "random": random_states()}
        self._begun = sum(learner.begun for learner in self._learners)
        self._saved = False

    def changing(self, steps: int) -> AbstractContextManager[None]:
        """For an update of so many optimizer `steps`, of all learners together, and its `mark`:
        once it has begun to change weights, signals wait for its end, where that is soon."""
        began = self._clock()

        def remaining() -> float | None:
            done = self._steps_begun()
            left = max(0, steps - done)
            return (self._clock() - began) / done * left if done else None

        return interrupted_after(remaining)

    def _steps_begun(self) -> int:
        """Optimizer steps since the mark: with any, weights may no longer be what was marked."""
        return sum(learner.begun for learner in self._learners) - self._begun

    def save_if_due(self, *, last: bool) -> None:
        """Write what was marked last where it is the run's `last` step, or the settings say so."""
        every, minutes = self._config.checkpoint_every, self._config.checkpoint_minutes
        pause = max(60 * minutes, self._took / _LONGEST_SHARE)
        by_time = minutes and self._clock() - self._last >= pause
        if last or by_time or (every and self._state["step"] % every == 0):
            self._save()

    def _save(self) -> None:
        """Write what was marked last, then remove those that are too many."""
        assert self.run is not None
        began = self._clock()
        self.run.sync()  # a run that goes on from here does not write those lines again
        with atomic_folder(self.run.checkpoint(self._state["step"])) as folder:
            save_state(folder, self._state)
        self._saved, self._last = True, self._clock()
        self._took = self._last - began
        kept = self._so_far(self.run)
        for _, path in kept[self._config.keep_checkpoints or len(kept) :]:
            shutil.rmtree(path, ignore_errors=True)

    def _so_far(self, run: RunDirectory) -> list[tuple[int, Path]]:
        """Without those of later steps, which are damaged where a run went on from an older one."""
        return [found for found in run.checkpoints() if found[0] <= self._state["step"]]

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The newest that is whole, None where there is none; `notes` name those that are not. A
        UserError where it was made of other data, or all are damaged."""
        assert self.run is not None
        found, self.notes = self.run.checkpoints(), []
        for step, folder in found:
            try:
                state = load_state(folder, device)
                if state.get("step") != step or "data" not in state:
                    raise Damaged(f"{folder} does not hold step {step} of a run.")
            except Damaged as error:
                self.notes.append(f"A damaged checkpoint is passed over: {error}")
                continue
            changed = changed_data(state["data"], self._data)
            if changed:
                raise UserError(
                    f"The {self._unit} are not those of the run in {self.run.path}, so held-out "
                    "ones may have been trained on: resume it with the same data, or start a new "
                    "run:\n" + "\n".join(f"  - {line}" for line in changed)
                )
            return state
        if found:
            raise UserError(
                f"No checkpoint of the run in {self.run.path} is whole; start a new run:\n"
                + "\n".join(f"  - {note}" for note in self.notes)
            )
        return None

    def note_on_resuming(self, step: int, steps: int) -> str:
        """Where a run of `steps` goes on that has loaded the checkpoint of `step`."""
        assert self.run is not None
        return f"The run goes on after step {step} of {steps}, from {self.run.checkpoint(step)}."

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Where the block fails after a step, save what was marked last, and add to the exception
        (`__notes__`) what is kept and how to go on."""
        self._last, self._state = self._clock(), {}
        try:
            with stopped_by_signals():
                yield
        except BaseException as error:
            if self.run is not None:
                note_folder(error, self.run.path)
            if self.run is not None and self._state.get("step"):
                error.add_note(self._rescue(self.run))
            raise
        finally:
            if self.run is not None:
                self.run.close()

    def _rescue(self, run: RunDirectory) -> str:
        lost = again = ""
        if self._steps_begun():
            step = self._state["step"] + 1
            lost = f"Step {step} had begun to change the weights, which cannot be undone.\n"
        elif not self._saved:
            try:
                self._save()
            except Exception as error:  # such as a full disk; what came first is to be seen
                reason = first_line(error).rstrip(".")
                lost = f"Step {self._state['step']} could not be kept ({reason}).\n"
        newest = next(iter(self._so_far(run)), None)
        if newest is None:
            return f"{lost}Nothing is kept; with run.checkpoint_every=N every N-th step is."
        if lost:
            again = f" What came after it, {duration(self._clock() - self._last)}, is to be redone."
        return (
            f"{lost}Step {newest[0]} is kept in {newest[1]}.{again}\nThe same run with "
            f"run.output_dir={shlex.quote(str(run.path))} run.resume=true goes on from there."
        )

"""What a run needs to resume as if it had never stopped, and when it is written: every few steps,
where that takes long in between, and when the run fails.

A checkpoint holds the *trained* weights (frozen ones are loaded from the model's folder again), the
optimizers and schedulers, and the states of every source of randomness.
"""

from __future__ import annotations

import pickle
import random
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ppo_engine.settings.schema import RunConfig

TRAINING_STATE = "training_state.pt"


def save_training_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of these) into an existing folder."""
    torch.save(state, folder / TRAINING_STATE)


def load_training_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """The state that `save_training_state` wrote; a missing or damaged file is a UserError."""
    path = folder / TRAINING_STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        # Never torch's own words, which advise to run whatever code the file holds.
        strange = "it was cut short, damaged, or not written by a run"
        reason = getattr(error, "strerror", None) or strange
        raise UserError(
            f"The checkpoint {path} cannot be read ({reason}): remove its folder to resume from "
            "the previous one."
        ) from error
    return state


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
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


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
    context of `kept`, the last one is saved when the next one fails.

    One that is written because much time has gone by takes the place of the one before it that was:
    a run of days does not fill the disk.

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
        self._by_time: Path | None = None  # the last that was written for the time alone
        self._measure, self._learners = measure, list(learners)
        self._data, self._unit = dict(data), unit
        self._state: dict[str, Any] = {}
        self._begun: list[int] = []
        self._saved = False

    def mark(self) -> None:
        """Remember where the run stands, random states included: a step may end here."""
        self._state = {**self._measure(), "data": self._data, "random": random_states()}
        self._begun = [learner.begun for learner in self._learners]
        self._saved = False

    def save_if_due(self, *, last: bool) -> None:
        """Write what was marked last where it is the run's `last` step, or the settings say so."""
        every, minutes = self._config.checkpoint_every, self._config.checkpoint_minutes
        if last or (every and self._state["step"] % every == 0):
            self._save()
        elif minutes and self._clock() - self._last >= 60 * minutes:
            before, self._by_time = self._by_time, self._save(by_time=True)
            if before is not None and before.parent == self._by_time.parent:  # not another run's
                shutil.rmtree(before, ignore_errors=True)

    def _save(self, *, by_time: bool = False) -> Path:
        """Write what was marked last; returns its folder. The file says whether it is there
        `by_time` alone: in a resumed run, too, the next one takes its place."""
        assert self.run is not None
        path = self.run.checkpoint(self._state["step"])
        with atomic_folder(path) as folder:
            save_training_state(folder, {**self._state, "by_time": by_time})
        self._saved, self._last = True, self._clock()
        return path

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The newest one, None where there is none; a UserError where it was made of other data."""
        assert self.run is not None
        newest = self.run.newest_checkpoint()
        if newest is None:
            return None
        state = load_training_state(newest[1], device)
        if "data" not in state:
            raise UserError(
                f"The checkpoint {newest[1]} is of an earlier version, which did not write down "
                f"which {self._unit} it was made of: finish its run with that version, or start a "
                "new run."
            )
        changed = changed_data(state["data"], self._data)
        if changed:
            raise UserError(
                f"The {self._unit} are not those of the run in {self.run.path}, so held-out ones "
                "may have been trained on: resume it with the same data, or start a new run:\n"
                + "\n".join(f"  - {line}" for line in changed)
            )
        self._by_time = newest[1] if state.get("by_time") else None
        return state

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Where the block fails after a step, save what was marked last, and add to the exception
        (`__notes__`) what is kept and how to go on."""
        self._last = self._clock()
        try:
            yield
        except BaseException as error:
            if self.run is not None:
                note_folder(error, self.run.path)
            if self.run is not None and self._state.get("step"):
                error.add_note(self._rescue(self.run))
            raise

    def _rescue(self, run: RunDirectory) -> str:
        lost = ""
        if self._begun != [learner.begun for learner in self._learners]:
            step = self._state["step"] + 1
            lost = f"Step {step} had begun to change the weights, which cannot be undone. "
        elif not self._saved:
            try:
                self._save()
            except Exception as error:  # such as a full disk; what came first is to be seen
                lost = f"Step {self._state['step']} could not be kept ({first_line(error)}). "
        newest = run.newest_checkpoint()
        if newest is None:
            return f"{lost}Nothing is kept; with run.checkpoint_every=N every N-th step is."
        return (
            f"{lost}Step {newest[0]} is kept in {newest[1]}: the same run with "
            f"run.output_dir={shlex.quote(str(run.path))} run.resume=true goes on from there."
        )

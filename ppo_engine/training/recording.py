"""Which steps of a run are recorded for people to look at and to replay, and what is kept of them.

`run.record_rollouts` says which. Unset, it is the first, about four more over the whole run, and
the first after a checkpoint, which that checkpoint can replay; of these last ones those stay whose
checkpoint does.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_engine.models.fingerprint import fingerprints
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.ppo.estimators import TITLES
from ppo_engine.ppo.experience import Experience
from ppo_engine.ppo.recorded import clip_bounds, token_arrays
from ppo_engine.run.directory import RunDirectory, folder_of_step
from ppo_engine.run.rollout_record import (
    ROLLOUTS,
    RolloutRecord,
    UpdateState,
    recorded_steps,
    write_record,
)
from ppo_engine.text.tokenizer import pieces

_SPREAD = 4  # over a run, besides the first
_BYTES = 64 << 20  # of a run's records, where nobody says how many there are
_SHARE = 0.01  # of the time, for those that follow a checkpoint


class Begun(NamedTuple):
    """A step that is to be recorded, before its update."""

    experience: Experience
    state: UpdateState
    generators: dict[str, Tensor]


class Recorder:
    """Of the steps of a run by `engine`: `begin` before an update, `write` after it. Neither
    changes a bit of the run."""

    def __init__(self, engine: PPOEngine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._every = engine.config.run.record_rollouts
        self._last, self._took = -math.inf, 0.0  # when the last was written, and how long it took
        self._removed: list[int] = []
        self._too_large = 0  # bytes, of one step

    def is_due(self, run: RunDirectory, step: int) -> bool:
        if self._every is not None:
            return self._every > 0 and (step - 1) % self._every == 0
        if self._too_large:
            return False
        if step in self._spread:
            return True
        rested = self._clock() - self._last >= self._took / _SHARE
        return rested and run.checkpoint(step - 1).is_dir()

    def begin(self, experience: Experience) -> Begun:
        engine, limit = self._engine, self._engine.budget.limit
        state = UpdateState(
            policy_version=experience.policy_version,
            kl_coef=float(experience.kl_coef),
            sampled=experience.sampled,
            width=experience.rollout.mask.shape[1],
            weights=trained_fingerprints(engine),
            steps=engine.config.steps,
            pass_tokens=limit.tokens,
            pass_rows=limit.rows,
            device=str(engine.device),
            dtype=str(engine.dtype).removeprefix("torch."),
        )
        generators = {
            "random_shuffle": engine.shuffle.get_state(),
            "random_torch": torch.get_rng_state(),
        }
        return Begun(experience, state, generators)

    def write(
        self,
        run: RunDirectory,
        step: int,
        begun: Begun,
        rewards: Mapping[str, Tensor],
        metrics: Mapping[str, float],
    ) -> None:
        """Record the `step` that was `begun`, with each reward's scores `[B]` and the `metrics` of
        its update; where few are kept, remove those that are too many."""
        began = self._clock()
        folder = folder_of_step(run.path / ROLLOUTS, step)
        write_record(folder, self._record(step, begun, rewards, metrics))
        self._last = self._clock()
        self._took = self._last - began
        if self._every is None:
            self._prune(run, step)

    def take_notes(self) -> list[str]:
        """What is to be said of records that were removed for their size, since the last call."""
        removed, self._removed = self._removed, []
        if not removed:
            return []
        limit = f"all are at most {_BYTES >> 20} MiB, unless run.record_rollouts=N asks for them."
        if self._too_large:
            size = f"{self._too_large / 2**20:,.0f} MiB"
            return [f"No step is recorded, as the record of one is {size}: {limit}"]
        steps = ", ".join(map(str, removed))
        return [f"The record of {steps} was removed, as records are too large: {limit}"]

    def _record(
        self,
        step: int,
        begun: Begun,
        rewards: Mapping[str, Tensor],
        metrics: Mapping[str, float],
    ) -> RolloutRecord:
        engine, experience = self._engine, begun.experience
        rollout, settings = experience.rollout, engine.config.ppo
        after, _ = engine.passes.of_policy(rollout)
        engine.trunks.clear()
        arrays = token_arrays(experience, after, settings)
        arrays |= {name: state.numpy() for name, state in begun.generators.items()}
        tokenizer = engine.policy.tokenizer
        special = set(tokenizer.added_tokens_decoder)
        responses = [response for _, response in rollout.written]
        return RolloutRecord(
            step=step,
            method=TITLES[settings.estimator],
            prompts=list(rollout.prompts),
            responses=list(rollout.responses),
            pieces=[pieces(tokenizer, response) for response in responses],
            special=sorted(special & {token for response in responses for token in response}),
            score=engine.rewards.total(rewards).tolist(),
            rewards={name: scores.tolist() for name, scores in rewards.items()},
            shaped=experience.scores.tolist(),
            kl=experience.kl.tolist(),
            finished=rollout.finished.tolist(),
            group=[number // settings.group_size for number in range(len(rollout))],
            clip_range=clip_bounds(settings),
            metrics={
                name: value if math.isfinite(value) else None for name, value in metrics.items()
            },
            update=begun.state,
            arrays=arrays,
        )

    @property
    def _spread(self) -> set[int]:
        steps = self._engine.config.steps
        return {1, *(math.ceil(steps * part / _SPREAD) for part in range(1, _SPREAD + 1))}

    def _prune(self, run: RunDirectory, newest: int) -> None:
        """Remove what is neither one of those over the whole run nor replayed by a checkpoint that
        stands; then, of the rest, what is too large: first those that nothing replays."""
        found = recorded_steps(run.path)
        replayed = {step for step in found if step == 1 or run.checkpoint(step - 1).is_dir()}
        for step in found.keys() - self._spread - replayed - {newest}:
            shutil.rmtree(found.pop(step), ignore_errors=True)
        sizes = {step: _size(folder) for step, folder in found.items()}
        order = sorted(found, key=lambda step: (step == newest, step in replayed, step))
        for step in order:
            if sum(sizes.values()) <= _BYTES:
                break
            if step == newest:
                self._too_large = sizes[step]
            shutil.rmtree(found[step], ignore_errors=True)
            self._removed.append(step)
            del sizes[step]


def trained_fingerprints(engine: PPOEngine) -> dict[str, str]:
    """Of the models that updates train: all weights, as they also read with the frozen ones."""
    models = {"policy": engine.policy.model}
    if engine.critic is not None:
        models["critic"] = engine.critic.model
    return fingerprints(models)


def discard_records(run: Path, after: int) -> None:
    """Remove the records of the steps behind `after`, which a resumed run takes anew."""
    for step, folder in recorded_steps(run).items():
        if step > after:
            shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())

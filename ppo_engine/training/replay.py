"""The update of a recorded step, again and alone: nothing is sampled, scored or written.

The state before it comes from a checkpoint, or from the models that the run began with, and from
updates of the recorded steps in between. With the same settings it is the recorded update, on a CPU
to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ppo_engine.errors import UserError, entry_point
from ppo_engine.messages import counted
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.ppo.experience import Experience
from ppo_engine.ppo.recorded import estimated_anew, restored, token_arrays
from ppo_engine.ppo.roles import optimizer_steps
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.run.progress import Progress
from ppo_engine.run.replayable import OF_ADVANTAGES, Plan, as_taken
from ppo_engine.run.rollout_record import RolloutRecord, read_record, recorded_steps
from ppo_engine.run.state_file import load_state
from ppo_engine.settings.schema import EnvironmentConfig, PPOConfig
from ppo_engine.training.recording import trained_fingerprints

_SAME = "="


class Replayed(NamedTuple):
    """Metrics of an update, as it was and as it is now, and of the policy after it; None where one
    is not finite."""

    recorded: dict[str, float | None]
    again: dict[str, float | None]


@entry_point
def replay(plan: Plan, *, console: Console | None = None) -> Replayed:
    """Take the update of a step again, and show its metrics beside those of the run. A UserError
    where the weights cannot be had that it began with."""
    title = f"Replay of step {plan.record.step} of {plan.run}"
    with Progress(len(plan.start.between) + 1, title, console=console) as progress:
        for line in _told(plan):
            progress.note(line)
        with progress.phase("load"):
            engine = _engine_before(plan)
        progress.note(_compared_weights(plan, engine))
        with progress.phase("update"):
            found = _update(plan, engine)
        progress.table(_table(plan, found))
        progress.note(_verdict(plan, found))
    return found


def _told(plan: Plan) -> list[str]:
    lines = [
        "It begins with the models that the run began with."
        if plan.start.checkpoint is None
        else f"It begins with {plan.start.checkpoint}."
    ]
    if plan.start.between:
        steps = ", ".join(map(str, plan.start.between))
        lines.append(f"Recorded steps in between are replayed first, as they were: {steps}.")
    return lines + [f"Changed: {line}" for line in plan.changes]


def _engine_before(plan: Plan) -> PPOEngine:
    """With the settings of the replay, in the state before its step."""
    recorded, before = recorded_steps(plan.run), plan.start.between
    settings = as_taken(plan.run, read_record(recorded[before[0]])) if before else plan.now
    engine = _engine(settings)
    if plan.start.checkpoint is not None:
        state = load_state(plan.start.checkpoint, engine.device)["engine"]
        engine.load_state_dict(state if before else _moved(state, plan))
    for step in before:
        record = read_record(recorded[step])
        taken = as_taken(plan.run, record)
        if taken != settings:  # the run was resumed with other steps, or went on in other passes
            state, settings = engine.state_dict(), taken
            engine = _engine(settings)
            engine.load_state_dict(state)
        _begin(engine, record)
        engine.update(_experience(engine, record))
    if settings != plan.now:
        state = engine.state_dict()
        engine = _engine(plan.now)
        engine.load_state_dict(_moved(state, plan))
    return engine


def _update(plan: Plan, engine: PPOEngine) -> Replayed:
    record, now = plan.record, plan.now
    _begin(engine, record)
    experience = _experience(engine, record)
    if plan.changed & OF_ADVANTAGES:
        kl_coef = now.ppo.kl_coef if "ppo.kl_coef" in plan.changed else None
        experience = estimated_anew(experience, engine.config.ppo, kl_coef)
    metrics = engine.update(experience)
    after, _ = engine.passes.of_policy(experience.rollout)
    arrays = token_arrays(experience, after, engine.config.ppo)
    again = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return Replayed(record.metrics | _after(record.arrays), again | _after(arrays))


def _engine(config: PPOConfig) -> PPOEngine:
    """As the run had it, but for what scores and answers, which nobody asks. Reward models are
    there where the critic starts from one, or where layers that they share with what is trained
    are read but once."""
    layers = config.policy.trainable_layers, config.critic.trainable_layers
    models = config.ppo.has_critic or layers != (None, None)
    kept = [source for source in configured_sources(config.reward) if source.path and models]
    offload = [name for name in config.run.offload if kept or name != "reward"]
    nameless: dict[str, Any] = {"path": None, "function": None, "url": None, "arguments": {}}
    config = replace(
        config,
        reward=replace(config.reward, **nameless, sources=kept, weights=None),
        environment=EnvironmentConfig(),
        run=replace(config.run, offload=offload),
    )
    return PPOEngine(reward=None if kept else _no_reward, config=config)


def _no_reward(prompts: list[Any], responses: list[str]) -> list[float]:
    raise AssertionError("a replay scores nothing")


def _moved(state: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """An engine's state at the same place of the schedules, where a step takes another number of
    optimizer steps."""
    then, now = optimizer_steps(plan.then), optimizer_steps(plan.now)

    def moved(learner: dict[str, Any] | None) -> dict[str, Any] | None:
        if learner is None:
            return None
        place = learner["scheduler"]["last_epoch"] * now // then
        return learner | {"scheduler": learner["scheduler"] | {"last_epoch": place}}

    return state | {name: moved(state[name]) for name in ("policy", "critic")}


def _begin(engine: PPOEngine, record: RolloutRecord) -> None:
    """Random numbers as they were before the update."""
    states = {
        name: torch.from_numpy(record.arrays[f"random_{name}"]) for name in ("shuffle", "torch")
    }
    engine.shuffle.set_state(states["shuffle"])
    torch.set_rng_state(states["torch"])


def _experience(engine: PPOEngine, record: RolloutRecord) -> Experience:
    """What the step learned from. Frozen layers that are run once have run over it, in the passes
    in which they did: in others, what they give would differ by rounding."""
    experience = restored(record, engine.config.ppo, engine.device)
    rollout = experience.rollout
    if engine.trunks.keep:
        told = rollout.prompts, rollout.responses, record.finished
        with engine.trunks.of(rollout):
            for model in engine.rewards.by_tokens.values():
                model(*told, written=rollout.written)
        engine.old_logprobs.are_samplers = experience.sampled
        engine.old_logprobs.measure(rollout)
        if engine.critic is not None:
            engine.values(rollout)
    return experience


def _compared_weights(plan: Plan, engine: PPOEngine) -> str:
    """Whether the weights are those that the step began with; a UserError where they should be,
    and are not."""
    if plan.then.run.dtype != plan.now.run.dtype:
        return f"Weights are {plan.now.run.dtype}; in the run they were {plan.then.run.dtype}."
    then, now = plan.record.update.weights, trained_fingerprints(engine)
    other = " and ".join(name for name in then if then[name] != now[name])
    if not other:
        return "The weights before the step are those of the run, to the bit."
    if not plan.start.between:
        raise UserError(
            f"The weights of the {other} are not those that step {plan.record.step} began with: "
            f"what the settings in {plan.run} name has changed since, or was trained from objects "
            "that Python was given."
        )
    return (
        f"The weights of the {other} before the step differ from those of the run: the updates in "
        "between rounded otherwise, on another machine or on a GPU."
    )


def _after(arrays: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """How far the update has moved the policy, over its own tokens."""
    own = arrays["mask"]
    if not own.any():
        return {}
    ratio = arrays["ratio"][own].astype(np.float64)
    return {
        "after/approx_kl": float((np.log(ratio) ** 2).mean() / 2),
        "after/clip_fraction": float(arrays["clipped"][own].mean()),
        "after/ratio_max": float(ratio.max()),
    }


def _table(plan: Plan, found: Replayed) -> Table:
    table = Table(title=f"Step {plan.record.step}", title_justify="left")
    for name in ("metric", "recorded", "replayed", "difference"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name in found.recorded | found.again:
        one, other = found.recorded.get(name), found.again.get(name)
        same = one == other and (name in found.recorded) == (name in found.again)
        change = f"{other - one:+.3g}" if one is not None and other is not None else "≠"
        table.add_row(
            name,
            _figure(found.recorded, name),
            _figure(found.again, name),
            _SAME if same else change,
            style="" if same else "bold",
        )
    return table


def _figure(metrics: Mapping[str, float | None], name: str) -> str:
    if name not in metrics:
        return ""
    value = metrics[name]
    return "not finite" if value is None else f"{value:.6g}"


def _verdict(plan: Plan, found: Replayed) -> str:
    names = found.recorded | found.again
    other = [name for name in names if found.recorded.get(name) != found.again.get(name)]
    if not other:
        return f"All {len(names)} metrics are the recorded ones, to the bit."
    told = f"{counted(len(other), 'metric')} of {len(names)} differ"
    if plan.changes:
        return f"{told}."
    return (
        f"{told}, with the settings of the run: other rounding, as on a GPU, by another number of "
        "threads or on another machine, or a change of the code."
    )

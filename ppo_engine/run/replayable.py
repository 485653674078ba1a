"""Which recorded steps can be replayed, from where, and with which other settings. All without
torch, so at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ppo_engine.errors import UserError
from ppo_engine.messages import nearest_path
from ppo_engine.run.directory import CHECKPOINTS, CONFIG, steps_in
from ppo_engine.run.rollout_record import RolloutRecord, read_record, recorded_steps
from ppo_engine.settings.checks import check_settings
from ppo_engine.settings.files import as_dict, changed_settings, flatten, load_config
from ppo_engine.settings.schema import PPOConfig, following, resolved

# What makes other advantages of the same scores, log-probs and values.
OF_ADVANTAGES = {
    f"ppo.{name}"
    for name in ("estimator", "gamma", "lam", "whiten_rewards", "kl_coef", "kl_in", "kl_estimator")
}
_OF_LOSSES = {
    f"ppo.{name}"
    for name in (
        "epochs",
        "mini_batch_size",
        "micro_batch_size",
        "micro_batch_tokens",
        "whiten_advantages",
        "objective",
        "ratio_level",
        "clip_range",
        "dual_clip",
        "reduction",
        "entropy_coef",
        "importance_cap",
        "value_clip_range",
    )
}
_OF_OPTIMIZERS = {
    f"{model}.optimizer.{name}"
    for model in ("policy", "critic")
    for name in (
        "learning_rate",
        "weight_decay",
        "beta1",
        "beta2",
        "eps",
        "schedule",
        "warmup_fraction",
        "max_grad_norm",
    )
}
_OF_THE_RUN = {"steps", "run.device", "run.dtype", "run.offload", "run.on_bad_numbers"}
_FREE = OF_ADVANTAGES | _OF_LOSSES | _OF_OPTIMIZERS | _OF_THE_RUN


class Start(NamedTuple):
    """Where a replay of a step begins."""

    checkpoint: Path | None  # None: the models that the run's settings name
    between: list[int]  # the steps from there on that come before it, all of them recorded


@dataclass(frozen=True)
class Plan:
    """A replay of the step of `record`."""

    run: Path
    record: RolloutRecord
    start: Start
    then: PPOConfig  # as the step was taken
    now: PPOConfig
    changes: list[str]  # from then to now, a line each
    changed: set[str]  # their keys


def plan_replay(run: Path, step: int | None, overrides: Sequence[str]) -> Plan:
    """Of `step` of the run in that folder, with other settings `key=value`. A UserError where that
    cannot be, which says what can."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is not a run's folder: it has no {CONFIG}.{nearest_path(run)}")
    settings = load_config(PPOConfig, str(run / CONFIG))
    recorded = recorded_steps(run)
    if not recorded:
        raise UserError(
            f"The run in {run} has recorded no step: ppo and grpo do so, unless "
            "run.record_rollouts=0."
        )
    if step is None:
        raise UserError(f"Which step? --step N. {_what_can_be(run)}")
    if step not in recorded:
        raise UserError(f"Step {step} of {run} is not recorded. {_what_can_be(run)}")
    start = start_of(run, step)
    if start is None:
        raise UserError(
            f"Step {step} of {run} cannot be replayed: of the weights that its update began with "
            f"there is no checkpoint, and not all steps from one on are recorded. "
            f"{_what_can_be(run)}"
        )
    if not settings.policy.path:
        raise UserError(
            f"{run / CONFIG} does not say of which policy: it was given to Python as an object. A "
            "run whose policy is a folder or a name can be replayed."
        )
    record = read_record(recorded[step])
    then, now = as_taken(run, record), as_taken(run, record, overrides)
    check_settings(now)
    before, after = (as_dict(resolved(config)) for config in (then, now))
    refused = changed_settings(before, after, _FREE)
    if refused:
        raise UserError(
            "A replay takes the recorded responses, scores and log-probs as they are, so these "
            "settings cannot be others:\n" + "\n".join(f"  - {line}" for line in refused)
        )
    flat = flatten(before), flatten(after)
    changed = {key for key in _FREE if flat[0].get(key) != flat[1].get(key)}
    _check_changes(record, then, now, changed)
    return Plan(run, record, start, then, now, changed_settings(before, after, ()), changed)


def start_of(run: Path, step: int) -> Start | None:
    """Where a replay of a recorded step begins, as near as there is; None where nowhere."""
    recorded, checkpoints = recorded_steps(run), steps_in(run / CHECKPOINTS)
    between: list[int] = []
    while step in recorded:
        step -= 1
        if step == 0 or step in checkpoints:
            return Start(checkpoints.get(step), between)
        between.insert(0, step)
    return None


def as_taken(run: Path, record: RolloutRecord, overrides: Sequence[str] = ()) -> PPOConfig:
    """The settings with which a step was taken: with what a run may change between its steps, or
    chooses by itself."""
    update = record.update
    taken = [
        f"steps={update.steps}",
        f"run.device={update.device}",
        f"run.dtype={update.dtype}",
        f"ppo.micro_batch_tokens={update.pass_tokens}",
        f"ppo.micro_batch_size={'null' if update.pass_rows is None else update.pass_rows}",
    ]
    config = load_config(PPOConfig, str(run / CONFIG), taken)
    if not overrides:
        return config
    # What the run's other settings came to follows the overrides again.
    taken += [f"{key}=null" for key in following(config)]
    return load_config(PPOConfig, str(run / CONFIG), [*taken, *overrides])


def _check_changes(
    record: RolloutRecord, then: PPOConfig, now: PPOConfig, changed: set[str]
) -> None:
    """Raise a UserError for what the record does not have."""
    if now.ppo.has_critic != then.ppo.has_critic or now.ppo.needs_greedy != then.ppo.needs_greedy:
        raise UserError(
            f"ppo.estimator={now.ppo.estimator} learns from something else than "
            f"{then.ppo.estimator}: the record has no critic's values or greedy responses for it."
        )
    if then.ppo.needs_greedy and changed & OF_ADVANTAGES:
        raise UserError(
            f"{', '.join(sorted(changed & OF_ADVANTAGES))}: advantages of remax cannot be "
            "estimated again, as greedy responses are not recorded."
        )
    if now.ppo.uses_kl and "ref_logprobs" not in record.arrays:
        raise UserError(
            f"ppo.kl_coef={now.ppo.kl_coef} needs the log-probs of the reference, which a run with "
            "ppo.kl_coef=0 does not measure, so that they are not recorded."
        )
    if "ppo.importance_cap" in changed and "sampler_logprobs" not in record.arrays:
        raise UserError(
            "ppo.importance_cap compares with the log-probs of the sampler, and this step's ratio "
            "begins with those themselves: in a run with ppo.old_logprobs=recompute it can be."
        )


def _what_can_be(run: Path) -> str:
    """Of the steps of a run, and how it is in another run."""
    recorded = recorded_steps(run)
    able = [step for step in recorded if start_of(run, step) is not None]
    return (
        f"Recorded: {_listed(recorded)}; of these can be replayed: {_listed(able)}. With "
        "run.record_rollouts=10 run.checkpoint_every=10 run.keep_checkpoints=0 a run has every "
        "tenth step with the checkpoint that it needs; with run.record_rollouts=1, every step is "
        "replayed from those before it."
    )


def _listed(steps: Sequence[int] | dict[int, Path]) -> str:
    return ", ".join(map(str, steps)) or "none"

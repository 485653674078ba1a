"""What a step learns from, into arrays and back."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rollouts import ROWS, SCORES, length, move, moved_engine, rollout_of, tokens_of
from torch import Tensor
from torch.nn.functional import pad
from trainers import same

from ppo_engine.models.optimizer import trainable_state
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.ppo.experience import Experience
from ppo_engine.ppo.recorded import estimated_anew, restored, token_arrays
from ppo_engine.run.directory import RunDirectory
from ppo_engine.run.rollout_record import RolloutRecord, read_record, recorded_steps
from ppo_engine.settings.schema import PPOConfig
from ppo_engine.training.recording import Recorder
from ppo_kernels import ppo_policy_loss

GROUPS = {"estimator": "grpo", "group_size": 3, "kl_in": "loss"}


def experience_of(engine: PPOEngine, **more: Any) -> Experience:
    rollout = rollout_of(**more)
    return engine.estimate_advantages(rollout, torch.tensor(SCORES))


def recorded(engine: PPOEngine, experience: Experience, folder: Path) -> RolloutRecord:
    """Of an update on `experience`, written and read again."""
    run, recorder = RunDirectory(folder, PPOConfig()), Recorder(engine)
    begun = recorder.begin(experience)
    metrics = engine.update(experience)
    recorder.write(run, 1, begun, {"length": torch.tensor(SCORES)}, metrics)
    run.close()
    return read_record(recorded_steps(folder)[1])


def sampler_logprobs(**_: Any) -> Tensor:
    mask = rollout_of().mask
    return torch.where(mask, -torch.rand(mask.shape), 9.0)


@pytest.mark.parametrize(
    "ppo",
    [
        {},
        {"kl_coef": 0.0},
        GROUPS,
        {"old_logprobs": "sampler", "estimator": "reinforce_pp"},
        {"importance_cap": 1.5, "whiten_rewards": True},
    ],
    ids=str,
)
def test_an_experience_comes_back_to_the_bit(tmp_path: Path, ppo: dict[str, Any]) -> None:
    engine = moved_engine(ppo=ppo)
    before = experience_of(engine, logprobs=sampler_logprobs())
    record = recorded(engine, before, tmp_path / "run")
    after = restored(record, engine.config.ppo, engine.device)
    for entry in fields(Experience):
        one, other = getattr(before, entry.name), getattr(after, entry.name)
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), entry.name
        elif entry.name != "rollout":
            assert one == other, entry.name
    rollout, again = before.rollout, after.rollout
    assert rollout.written == again.written and rollout.rows == again.rows
    for name in ("mask", "prompt_mask", "finished", "response_mask"):
        assert torch.equal(getattr(rollout, name), getattr(again, name)), name
    assert (rollout.prompts, rollout.responses) == (again.prompts, again.responses)


def test_padding_is_as_wide_as_it_was(tmp_path: Path) -> None:
    """Beyond the longest response too."""
    engine, rollout = moved_engine(), rollout_of()
    columns = {"response_ids": 0, "mask": False, "environment_mask": False}
    wider = {name: pad(getattr(rollout, name), (0, 3), value=x) for name, x in columns.items()}
    before = engine.estimate_advantages(replace(rollout, **wider), torch.tensor(SCORES))
    after = restored(recorded(engine, before, tmp_path / "run"), engine.config.ppo, engine.device)
    assert torch.equal(after.rollout.mask, before.rollout.mask)
    assert torch.equal(after.advantages, before.advantages)


def test_numbers_stand_at_their_tokens(tmp_path: Path) -> None:
    engine = moved_engine()
    experience = experience_of(engine)
    record = recorded(engine, experience, tmp_path / "run")
    for row, (given, (ids, own)) in enumerate(zip(ROWS, map(tokens_of, ROWS), strict=True)):
        assert record.of("tokens", row).tolist() == ids
        assert record.of("mask", row).tolist() == own
        width = len(ids)
        for name in ("logprobs", "values", "advantages", "returns", "ref_logprobs", "entropy"):
            expected = getattr(experience, name)[row, :width]
            assert np.array_equal(record.of(name, row), expected.numpy()), name
            assert not record.of(name, row)[~np.array(own)].any()
        assert "".join(record.pieces[row]).replace("<|im_end|>", "") == "".join(given.turns)
    assert record.group == [0, 1, 2, 3, 4, 5]
    assert record.special == [engine.policy.tokenizer.eos_token_id]
    assert record.score == pytest.approx(SCORES) and record.rewards["length"] == record.score
    assert "sampler_logprobs" not in record.arrays  # which nobody knows


def test_the_ratio_is_of_the_policy_after_the_update(tmp_path: Path) -> None:
    engine = moved_engine()
    experience = experience_of(engine)
    record = recorded(engine, experience, tmp_path / "run")
    now, _ = engine.passes.of_policy(experience.rollout)
    expected = (now - experience.logprobs).exp()[experience.rollout.mask]
    found = record.arrays["ratio"][record.arrays["mask"]]
    assert np.array_equal(found, expected.numpy())
    assert np.abs(found - 1).max() > 1e-3
    assert not record.arrays["ratio"][~record.arrays["mask"]].any()


@pytest.mark.parametrize(
    "ppo",
    [
        {"clip_range": 0.05},
        {"clip_range": (0.02, 0.3), "whiten_advantages": False},
        {"clip_range": 0.03, "objective": "cispo"},
        {"clip_range": 0.01, "ratio_level": "sequence"},
    ],
    ids=str,
)
def test_which_tokens_are_clipped(ppo: dict[str, Any]) -> None:
    engine = moved_engine(ppo=ppo)
    experience = experience_of(engine)
    settings = engine.config.ppo
    move(engine.policy.model, seed=3, by=0.05)
    after, _ = engine.passes.of_policy(experience.rollout)
    arrays = token_arrays(experience, after, settings)
    _, stats = ppo_policy_loss(
        after,
        experience.logprobs,
        experience.advantages,
        mask=experience.rollout.mask,
        objective=settings.objective,
        ratio_level=settings.ratio_level,
        clip_range=settings.clip_range,
        moments=experience.moments if settings.whiten_advantages else None,
    )
    own = arrays["mask"]
    assert 0 < stats.clip_fraction < 1
    assert arrays["clipped"][own].mean() == pytest.approx(float(stats.clip_fraction))
    assert not arrays["clipped"][~own].any()


@pytest.mark.parametrize("ppo", [{}, GROUPS, {"whiten_rewards": True, "lam": 0.3}], ids=str)
def test_advantages_again_are_the_same(ppo: dict[str, Any]) -> None:
    engine = moved_engine(ppo=ppo)
    experience = experience_of(engine)
    again = estimated_anew(experience, engine.config.ppo)
    for name in ("advantages", "returns", "moments", "kl", "kl_coef"):
        one, other = getattr(experience, name), getattr(again, name)
        assert (one is None and other is None) or torch.equal(one, other), name


def test_advantages_by_other_settings_are_those_of_an_engine_that_has_them() -> None:
    other = {"lam": 0.2, "gamma": 0.9, "kl_coef": 0.4}
    experience = experience_of(moved_engine())
    engine = moved_engine(ppo=other)
    expected = experience_of(engine)
    found = estimated_anew(experience, engine.config.ppo, kl_coef=0.4)
    for name in ("advantages", "returns", "moments", "kl_coef"):
        assert torch.equal(getattr(expected, name), getattr(found, name)), name
    assert not torch.equal(experience.advantages, found.advantages)


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_recording_changes_no_bit(tmp_path: Path, model: str) -> None:
    def trained(record: bool) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        engine = moved_engine(length, policy={"trainable_layers": 1})
        metrics = []
        for step in (1, 2):
            experience = experience_of(engine)
            if record:
                recorded(engine, experience, tmp_path / str(step))
                metrics.append(read_record(recorded_steps(tmp_path / str(step))[1]).metrics)
            else:
                metrics.append(engine.update(experience))
        learner = {"policy": engine.actor.learner, "critic": engine.critic.learner}[model]
        return {name: x.clone() for name, x in trainable_state(learner.model).items()}, metrics

    (weights, metrics), (others, logged) = trained(True), trained(False)
    assert same(weights, others) and metrics == logged

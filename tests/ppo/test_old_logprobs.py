"""Whose log-probs the ratio starts from, and what is not read where nothing needs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import PROMPTS, make_engine

from ppo_engine import PPOEngine
from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel


def step(engine: PPOEngine) -> tuple[Any, dict[str, float]]:
    rollout = engine.generate(PROMPTS)
    experience = engine.estimate_advantages(rollout, engine.score(rollout))
    return experience, engine.update(experience)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[LanguageModel]:
    """The models that are read without gradients."""
    models: list[LanguageModel] = []
    inner = LanguageModel.states

    def states(self: LanguageModel, rows: Any) -> Any:
        models.append(self)
        return inner(self, rows)

    monkeypatch.setattr(LanguageModel, "states", states)
    return models


def test_after_the_first_rollout_they_are_the_samplers(read):
    engine = make_engine()
    first, metrics = step(engine)
    assert not first.sampled and read.count(engine.policy) == 1
    assert metrics["objective/kl"] == 0  # exactly: both are of a pass
    assert 0 < metrics["rollout/logprob_diff"] <= metrics["rollout/logprob_diff_max"] < 1e-4
    read.clear()
    second, metrics = step(engine)
    assert second.sampled and second.entropy is None
    assert read == [engine.reference]
    assert "rollout/logprob_diff" not in metrics and metrics["objective/kl"] != 0
    assert 0 < metrics["objective/entropy"] < 6


def test_they_are_those_of_a_pass_to_rounding():
    engine = make_engine(ppo={"old_logprobs": "sampler"})
    rollout = engine.generate(PROMPTS)
    experience = engine.estimate_advantages(rollout, engine.score(rollout))
    logprobs, ref_logprobs, entropy = engine.compare_with_reference(rollout)
    torch.testing.assert_close(experience.logprobs, logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(experience.ref_logprobs, ref_logprobs)
    measured = engine.update(experience)["objective/entropy"]
    assert measured == pytest.approx(entropy[rollout.mask].mean().item(), rel=1e-4)


def test_the_entropy_of_an_update_is_of_tokens_not_of_mini_batches():
    ends = tuple(range(60, 160))  # so that responses are of many lengths
    engine = make_engine(
        ppo={"old_logprobs": "sampler", "mini_batch_size": 3, "epochs": 2},
        policy={"optimizer": {"learning_rate": 1e-9}},
        generation={"stop": ends, "temperature": 0.02},
    )
    rollout = engine.generate(PROMPTS)
    experience = engine.estimate_advantages(rollout, engine.score(rollout))
    of_tokens = engine.compare_with_reference(rollout)[2]
    measured = engine.update(experience)["objective/entropy"]
    assert measured == pytest.approx(of_tokens[rollout.mask].mean().item(), rel=1e-4)
    of_responses = of_tokens.sum(1) / rollout.mask.sum(1)
    assert measured != pytest.approx(of_responses.mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"ppo": {"old_logprobs": "recompute"}},
        {"generation": {"top_k": 20}},
        {"generation": {"top_p": 0.9}},
        {"generation": {"min_new_tokens": 2}},
        {"ppo": {"importance_cap": 2.0}},
    ],
    ids=str,
)
def test_where_they_are_recomputed(settings):
    engine = make_engine(**settings)
    for _ in range(2):
        experience, metrics = step(engine)
        assert not experience.sampled and "rollout/logprob_diff" in metrics
    capped = "importance_cap" in settings.get("ppo", {})
    assert ("objective/importance_capped" in metrics) == capped


def test_a_sampler_that_differs_is_not_believed(monkeypatch):
    monkeypatch.setattr("ppo_engine.ppo.old_logprobs.SAMPLERS_BOUND", 0.0)
    engine = make_engine()
    assert not any(step(engine)[0].sampled for _ in range(2))


ONE_STEP = {"epochs": 1, "mini_batch_size": 8, "rollout_batch_size": 8, "kl_in": "loss"}


def test_one_step_on_policy_measures_them_by_the_way(read, monkeypatch):
    """What is learned has the same bits, and the metrics are those of a pass."""
    monkeypatch.setattr("ppo_engine.ppo.old_logprobs.SAMPLERS_BOUND", 0.0)
    other = make_engine(ppo=ONE_STEP | {"old_logprobs": "recompute"})
    expected = [step(other) for _ in range(3)]
    engine = make_engine(ppo=ONE_STEP)
    for count, (recomputed, metrics) in enumerate(expected):
        read.clear()
        experience, found = step(engine)
        assert experience.deferred == (count > 0) and not recomputed.deferred
        assert count == 0 or read == [engine.reference]
        torch.testing.assert_close(experience.logprobs, recomputed.logprobs, rtol=0, atol=1e-5)
        assert (found["objective/kl"] == 0) == (count == 0)
        assert found == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    pairs = zip(engine.policy.model.parameters(), other.policy.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 2},
        {"mini_batch_size": 4},
        {"kl_in": "reward"},
        {"adaptive_kl": {}},
        {"critic_warmup_steps": 1},
        {"importance_cap": 2.0},
        {"old_logprobs": "recompute"},
    ],
    ids=str,
)
def test_what_needs_them_before_the_update(changed, monkeypatch):
    monkeypatch.setattr("ppo_engine.ppo.old_logprobs.SAMPLERS_BOUND", 0.0)
    engine = make_engine(ppo=ONE_STEP | changed)
    assert not any(step(engine)[0].deferred for _ in range(2))


def test_log_probs_that_were_not_measured_are_not_used(monkeypatch):
    monkeypatch.setattr("ppo_engine.ppo.old_logprobs.SAMPLERS_BOUND", 0.0)
    engine = make_engine(ppo=ONE_STEP)
    step(engine)
    rollout = engine.generate(PROMPTS)
    experience = engine.estimate_advantages(rollout, engine.score(rollout))
    halves = [experience.select(torch.tensor(rows)) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    engine.update(halves[0])
    with pytest.raises(ValueError, match=r"ppo\.old_logprobs=recompute"):
        engine.update(halves[1])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"generation": {"top_p": 0.5}}, "from the whole distribution"),
        ({"ppo": {"importance_cap": 2.0}}, "nothing to correct"),
    ],
)
def test_what_contradicts_the_samplers_is_an_error(settings, match):
    ppo = {"old_logprobs": "sampler", **settings.pop("ppo", {})}
    with pytest.raises(UserError, match=match):
        make_engine(ppo=ppo, **settings)


def test_without_a_penalty_the_reference_is_not_read(read):
    engine = make_engine(ppo={"kl_coef": 0.0})
    experience, metrics = step(engine)
    assert engine.reference not in read and experience.ref_logprobs is None
    assert "objective/kl" not in metrics and not experience.kl.any()


def test_a_resumed_run_takes_what_it_took():
    engine = make_engine()
    step(engine)
    again = make_engine()
    again.load_state_dict(engine.state_dict())
    assert again.old_logprobs.are_samplers is True and step(again)[0].sampled

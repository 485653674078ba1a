"""Frozen models that wait on the CPU between their uses: the same numbers. Here the CPU's memory
stands in for the device's, too: what comes to it is a copy."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import of_family
from rollouts import length, move, moved_engine, rollout_of
from tiny import tiny_tokenizer
from torch import Tensor
from trainers import PROMPTS, config, untimed

from ppo_engine.errors import UserError
from ppo_engine.models import value_model
from ppo_engine.models.offload import Offloaded, address
from ppo_engine.ppo import engine as module
from ppo_engine.ppo.offloading import let_wait
from ppo_engine.ppo.trunks import Trunks
from ppo_engine.rewards.model import RewardModel
from ppo_engine.settings.schema import EvaluationConfig, RunConfig, SFTConfig
from ppo_engine.training.ppo import PPOTrainer
from ppo_engine.training.sft import SFTTrainer

CPU = torch.device("cpu")


def judge() -> RewardModel:
    """Of the policies below, with one layer and the head of its own."""
    # Not read from a file, where weights lie at addresses by which products round.
    model = value_model.value_model_from_policy(policy(), tiny_tokenizer(), seed=3)
    move(model.model.layers[3])
    return RewardModel(model, tiny_tokenizer(), device=CPU, dtype=torch.float32)


def policy() -> Any:
    return of_family("llama", num_hidden_layers=4, tie_word_embeddings=True)


def engine_of(**settings: Any) -> Any:
    sizes = {"epochs": 2, "mini_batch_size": 3, "micro_batch_tokens": 60}
    return moved_engine(judge(), model=policy(), ppo=sizes, **settings)


def waiting(engine: Any, *names: str) -> Any:
    frozen = {"reference": [engine.reference], "reward": engine.rewards.models}
    let_wait(names, frozen, [engine.policy, engine.critic], CPU)
    return engine


def step_of(engine: Any) -> dict[str, float]:
    rollout = rollout_of()
    return engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))


def places(model: Any) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("names", [("reference",), ("reward",), ("reference", "reward")], ids=str)
@pytest.mark.parametrize("trained", [None, 1], ids=["all", "one layer"])
def test_a_step_is_the_same(names, trained):
    """Also where frozen layers are shared, and what comes of them is kept."""
    layers = {name: {"trainable_layers": trained} for name in ("policy", "critic")}
    engines = engine_of(**layers), engine_of(**layers)
    waiting(engines[1], *names)
    for _ in range(2):
        expected, found = map(step_of, engines)
        assert found == expected
    for name, weight in engines[0].policy.model.state_dict().items():
        assert torch.equal(weight, engines[1].policy.model.state_dict()[name])


def test_who_reads_is_on_the_device_once_in_a_phase(monkeypatch):
    engine = waiting(engine_of(), "reference", "reward")
    reference, judge = engine.reference, engine.rewards.models[0]
    judge.budget = engine.budget  # for several passes
    away = {role: places(role.model) for role in (reference, judge)}
    there: list[tuple[bool, ...]] = []

    def seen(*_: Any) -> None:
        there.append(tuple(places(role.model) != old for role, old in away.items()))

    for role in (engine.policy, engine.critic, *away):
        role.model.base_model.register_forward_pre_hook(seen)
    fetched = []
    fetch = Offloaded._fetch
    monkeypatch.setattr(Offloaded, "_fetch", lambda self: (fetched.append(self), fetch(self)))
    rollout = rollout_of()
    scores = engine.score(rollout)
    experience = engine.estimate_advantages(rollout, scores)
    phases = {
        (False, True): lambda: engine.score(rollout),
        (True, False): lambda: engine.compare_with_reference(rollout),
        (False, False): lambda: (engine.values(rollout), engine.update(experience)),
    }
    fetched.clear()
    for expected, phase in phases.items():
        there.clear()
        phase()
        assert there == [expected] * len(there) and len(there) > 1
    assert fetched == [judge.reader.offloaded, reference.reader.offloaded]
    assert all(places(role.model) == old for role, old in away.items())


def test_copies_are_gone_after_their_use_and_after_a_failure(monkeypatch):
    engine = waiting(engine_of(), "reward")
    [judge] = engine.rewards.models
    alive: list[weakref.ref[Tensor]] = []
    judge.model.base_model.register_forward_pre_hook(
        lambda model, _: alive.extend(
            weakref.ref(p.data.untyped_storage()) for p in model.parameters()
        )
    )
    engine.score(rollout_of())
    gc.collect()
    assert alive and not any(ref() is not None for ref in alive)
    before, made = places(judge.model), []
    empty_like = torch.empty_like

    def full(*given: Any, **named: Any) -> Tensor:
        made.append(empty_like(*given, **named))
        if len(made) in fails:
            raise torch.OutOfMemoryError
        return made[-1]

    for fails in ({3}, {3, 4}):
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", full)
            if len(fails) == 1:  # once more, when freed memory is given back
                assert engine.score(rollout_of()).isfinite().all()
            else:
                with pytest.raises(UserError, match=r"weights that wait on the CPU \(run\.offload"):
                    engine.score(rollout_of())
        assert places(judge.model) == before
    assert engine.score(rollout_of()).isfinite().all()


def test_what_another_model_has_stays():
    engine = engine_of(policy={"trainable_layers": 1}, critic={"trainable_layers": 1})
    shared = set(places(engine.policy.model)) & set(places(engine.reference.model))
    waiting(engine, "reference")
    assert len(shared) > 20 and shared <= set(places(engine.reference.model))
    assert engine.policy.shares_head(engine.reference)  # tied to embeddings, which are frozen
    alone = [p for p in engine.reference.model.parameters() if p.data_ptr() not in shared]
    assert alone and all(address(p) == p.data_ptr() for p in alone)
    with engine.reference.reader.on_device():
        with engine.reference.reader.on_device():
            pass
        assert all(address(p) != p.data_ptr() for p in alone)
    assert all(address(p) == p.data_ptr() for p in alone)


def test_tied_weights_come_as_one():
    model = of_family("llama", tie_word_embeddings=True)
    twin = torch.nn.Parameter(model.lm_head.weight.data, requires_grad=False)
    model.twin = twin
    offloaded = Offloaded(model.requires_grad_(False), CPU, set())
    for _ in range(2):
        assert twin.data_ptr() == model.lm_head.weight.data_ptr()
        with offloaded.on_device():
            assert twin.data_ptr() == model.lm_head.weight.data_ptr() != address(twin)


def test_who_shares_layers_is_found_out_once(monkeypatch):
    engine = engine_of(policy={"trainable_layers": 1}, critic={"trainable_layers": 1})
    waiting(engine, "reference", "reward")
    found = []
    find = Trunks._find
    monkeypatch.setattr(Trunks, "_find", lambda self: (found.append(1), find(self)))
    for _ in range(2):
        step_of(engine)
    assert len(found) == 1
    with torch.no_grad():
        next(iter(engine.rewards.models[0].model.parameters())).mul_(2)
    step_of(engine)
    assert len(found) == 2  # a weight that has changed is seen as before


def test_a_run_is_the_same(tmp_path, monkeypatch):
    """Evaluations, which sample from the reference, included."""
    monkeypatch.setattr("ppo_engine.training.ppo.write_curves", lambda *_: None)
    monkeypatch.setattr(module, "check_offload", lambda *_: None)
    for name, offload in (("there", []), ("away", ["reference", "reward"])):
        settings = config(tmp_path / name, offload=offload)
        settings = replace(settings, evaluation=EvaluationConfig(prompts=2, every=1))
        trainer = PPOTrainer(
            policy(), judge(), PROMPTS, config=settings, tokenizer=tiny_tokenizer()
        )
        trainer.train()
        assert (trainer.engine.reference.reader.offloaded is None) == (name == "there")
        assert trainer.evaluator._of_reference is None
    assert untimed(tmp_path / "there/metrics.jsonl") == untimed(tmp_path / "away/metrics.jsonl")


def test_where_nothing_would_wait_it_is_refused(tmp_path):
    run = {"run": RunConfig(dtype="float32", device="cpu", offload=["reference"])}
    with pytest.raises(
        UserError, match=r"run.offload=\['reference'\] would have no effect: .* CPU"
    ):
        PPOTrainer(
            policy(),
            length,
            PROMPTS,
            config=config(tmp_path, offload=["reference"]),
            tokenizer=tiny_tokenizer(),
        )
    with pytest.raises(UserError, match=r"run.offload would have no effect: `sft` has no frozen"):
        SFTTrainer("x", [], SFTConfig(**run))
    engine = moved_engine()
    with pytest.raises(
        UserError, match=r"run.offload has 'reward', but no reward here has weights"
    ):
        waiting(engine, "reference", "reward")
    assert engine.reference.reader.offloaded is None

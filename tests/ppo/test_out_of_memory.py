"""A pass for which there is no memory: the step is that of an engine with the smaller budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from rollouts import SCORES, move, moved_engine, rollout_of
from torch import Tensor

from ppo_engine.errors import UserError
from ppo_engine.models import value_model
from ppo_engine.models.reader import Limit, Reader
from ppo_engine.pretrained.loading import save_model

FULL = partial(torch.OutOfMemoryError, "CUDA out of memory.")
TOKENS = 60  # of a pass: two of the mini-batch


def engine_of(**more: Any) -> Any:
    sizes = {"mini_batch_size": 6, "micro_batch_size": None, "micro_batch_tokens": TOKENS}
    return moved_engine(ppo=sizes, **more)


def failing(function: Callable[..., Any], *calls: int, after: bool = False) -> Any:
    """`function`, in the calls of these numbers (from 1) without memory, `after` it is done."""
    count = 0

    def called(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls and not after:
            raise FULL()
        found = function(*given, **named)
        if count in calls:
            raise FULL()
        return found

    return called


def trained(engine: Any) -> list[Tensor]:
    models = engine.policy.model, engine.critic.model
    return [p.clone() for model in models for p in model.parameters()]


Run = tuple[list[Limit], dict[str, float], list[Tensor], list[str]]


def updated(patch: Any, limits: list[Limit] | None = None) -> Run:
    """The budget with which policy and critic stepped, metrics, weights and notes of an update;
    with these budgets from the start, or else as memory runs out in it."""
    engine, rollout = engine_of(), rollout_of()
    experience = engine.estimate_advantages(rollout, SCORES)
    engine.actor.version += 1
    step, found = engine.actor.learner.step, []

    def stepped(losses: Any) -> Tensor:
        found.append(engine.budget.limit)
        if limits:
            engine.budget.limit = limits[1]
        return step(losses)

    engine.actor.learner.step = stepped
    if limits:
        engine.budget.limit = limits[0]
    else:
        owner, name, after, calls = patch
        setattr(owner, name, failing(getattr(owner, name), *calls, after=after))
    metrics = engine.update(experience)
    return [*found, engine.budget.limit], metrics, trained(engine), engine.take_notes()


@pytest.mark.parametrize("calls", [(1,), (2,), (4,), (2, 5)], ids=str)
@pytest.mark.parametrize(
    ("owner", "name", "after"), [(Reader, "read", False), (Tensor, "backward", True)]
)
def test_an_update_is_that_of_the_smaller_budget(monkeypatch, owner, name, after, calls):
    """Of the policy, and where the fourth pass fails of the critic; a backward pass fails when
    its gradients are there."""
    monkeypatch.setattr(owner, name, getattr(owner, name))  # to be restored
    limits, metrics, weights, [note] = updated((owner, name, after, calls))
    monkeypatch.undo()
    _, expected, others, notes = updated(None, limits)
    assert (limits[0].tokens == TOKENS) == (calls == (4,))
    assert limits[1].tokens < TOKENS // 2 ** (len(calls) - 1)
    assert "(CUDA out of memory.)" in note and not notes
    assert metrics == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_measurements_and_scores_begin_again(monkeypatch, tmp_path):
    policy = engine_of().policy
    judge = value_model.value_model_from_policy(policy.model, policy.tokenizer, seed=3)
    save_model(judge, policy.tokenizer, tmp_path / "reward")
    read = Reader.read

    def short(reader: Reader, rows: Any, *more: Any) -> Any:
        if rows.ids.numel() > 30:
            raise FULL()
        return read(reader, rows, *more)

    found: list[list[Tensor]] = []
    limit = Limit(TOKENS)
    engines = [engine_of(score=str(tmp_path / "reward")) for _ in range(2)]
    for engine, memory in zip(engines, (short, read), strict=True):
        rollout = rollout_of()
        engine.budget.limit = limit
        monkeypatch.setattr(Reader, "read", memory)
        scores = engine.score(rollout)
        limit = engine.budget.limit  # the same for all that follows
        experience = engine.estimate_advantages(rollout, scores)
        assert engine.budget.limit == limit and limit.tokens <= 30
        found.append([scores, experience.logprobs, experience.ref_logprobs, experience.values])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_response_alone_is_an_error_and_nothing_has_changed(monkeypatch):
    engine, rollout = engine_of(), rollout_of()
    experience = engine.estimate_advantages(rollout, SCORES)
    move(engine.policy.model, seed=3)
    before = trained(engine)
    monkeypatch.setattr(
        engine.policy, "policy_loss", failing(engine.policy.policy_loss, *range(99))
    )
    with pytest.raises(UserError, match=r"one row of .* Lower generation.max_new_tokens"):
        engine.update(experience)
    assert all(torch.equal(a, b) for a, b in zip(trained(engine), before, strict=True))
    assert engine.actor.learner.begun == 0

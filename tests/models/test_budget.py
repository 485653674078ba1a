"""Where memory runs out in a pass, half of its tokens; nothing of the failure stays."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch

from ppo_engine.errors import UserError
from ppo_engine.memory import is_out_of_memory
from ppo_engine.models.budget import Budget
from ppo_engine.models.optimizer import Learner
from ppo_engine.models.reader import Limit
from ppo_engine.models.work import Work, counting
from ppo_engine.settings.schema import OptimizerConfig

LENGTHS = [30, 5, 12, 8, 20, 25]
FULL = partial(torch.OutOfMemoryError, "CUDA out of memory. Tried 2.00 GiB.\nMore.")


def fitting(most: int, packed: bool, tried: list[Any]) -> Any:
    """Passes over `LENGTHS` on a machine that has room for `most` tokens."""

    def attempt(passes: list[list[int]]) -> str:
        tried.append(passes)
        for indices in passes:
            of_pass = [LENGTHS[i] for i in indices]
            if (sum(of_pass) if packed else len(of_pass) * max(of_pass)) > most:
                raise FULL()
        return "done"

    return attempt


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("limit", "most"), [(Limit(9999), 30), (Limit(9999, 3), 40), (Limit(1), 30)]
)
def test_passes_are_halved_until_they_fit_and_stay_so(limit, most, packed):
    budget, tried = Budget(limit, "sft"), []
    assert budget.run(LENGTHS, fitting(most, packed, tried), packed=packed) == "done"
    assert budget.limit.rows == limit.rows
    # As they would have been from the start.
    again = Budget(budget.limit)
    assert again.run(LENGTHS, lambda passes: passes, packed=packed) == tried[-1]
    assert len(tried) == len({str(passes) for passes in tried})  # no attempt for nothing
    assert budget.limit.tokens >= most // 2 or limit.tokens == 1
    note = budget.take_note()
    if limit.tokens == 1:
        assert len(tried) == 1 and note is None
        return
    largest = [LENGTHS[i] for i in tried[0][0]]
    first = sum(largest) if packed else len(largest) * max(largest)
    assert f"in a pass of {first} tokens (CUDA out of memory. Tried 2.00 GiB.)" in note
    assert f"Set sft.micro_batch_tokens={budget.limit.tokens} " in note
    assert budget.take_note() is None  # once
    tried.clear()
    budget.run(LENGTHS, fitting(most, packed, tried), packed=packed)
    assert len(tried) == 1 and budget.take_note() is None


@pytest.mark.parametrize(
    ("section", "lower"),
    [
        ("ppo", "generation.max_new_tokens or data"),
        ("reward", "data.max_tokens"),
        ("", "the length"),
    ],
)
def test_a_row_alone_is_not_divided(section, lower):
    budget, tried = Budget(Limit(9999), section), []
    message = rf"one row of 30 tokens, which cannot be divided \(CUDA .*GiB.\). Lower {lower}"
    with pytest.raises(UserError, match=message):
        budget.run(LENGTHS, fitting(29, True, tried), packed=True)
    assert [len(x) for x in tried[-1]] == [1] * len(LENGTHS)


@pytest.mark.parametrize(
    ("raised", "meant"),
    [
        (FULL(), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_what_is_not_memory_is_raised_as_it_is(raised, meant):
    calls = []

    def attempt(_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise raised

    budget = Budget(Limit(9999))
    if meant:
        budget.run(LENGTHS, attempt, packed=True)
        assert f"({type(raised).__name__ if not str(raised) else ''}" in budget.take_note()
    else:
        with pytest.raises(type(raised)) as caught:
            budget.run(LENGTHS, attempt, packed=True)
        assert caught.value is raised and budget.limit == Limit(9999)


def test_work_that_is_done_again_counts_once():
    work, attempts = Work(torch.device("cpu")), []

    def attempt(_: Any) -> None:
        attempts.append(1)
        work.read += 100
        if len(attempts) == 1:
            raise FULL()

    with counting(work):
        Budget(Limit(9999)).run(LENGTHS, attempt, packed=True)
    assert work.read == 100 and len(attempts) == 2


def test_torchs_own_errors_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


def test_what_a_failure_held_is_free_before_the_next_attempt():
    alive: list[weakref.ref[torch.Tensor]] = []
    gc.disable()

    def pass_of(x: torch.Tensor) -> None:
        states = x.exp()  # kept for gradients
        alive.extend(map(weakref.ref, (x, states)))
        cycle: list[Any] = [states.square()]
        cycle.append(cycle)
        alive.append(weakref.ref(cycle[0]))
        states.register_hook(fail)
        states.sum().backward()

    def fail(_: torch.Tensor) -> None:
        try:
            raise KeyError  # which goes on as the error's context
        except KeyError:
            raise FULL() from None

    def attempt(_: Any) -> None:
        if alive:
            assert len(alive) == 3 and not any(ref() is not None for ref in alive)
        else:
            pass_of(torch.ones(4, requires_grad=True))

    try:
        Budget(Limit(9999)).run(LENGTHS, attempt, packed=True)
    finally:
        gc.enable()


def test_the_optimizer_says_what_to_lower():
    model = torch.nn.Linear(2, 1)
    learner = Learner(model, OptimizerConfig(learning_rate=1e-3), 3, "the critic")
    model(torch.ones(2)).backward()

    def step(_: Any) -> None:
        raise FULL()

    learner.optimizer.step = step
    message = r"optimizer of the critic \(update 1\) \(CUDA .*GiB.\), .* optimizer.moments=8bit"
    with pytest.raises(UserError, match=message):
        learner.step()
    assert learner.begun == 1  # no checkpoint is made of what may be half a step

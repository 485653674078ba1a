"""Python functions as rewards, sync or async: what they get, may return, and get wrong."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading

import numpy as np
import pytest
import torch

from ppo_engine.errors import UserError
from ppo_engine.rewards.function import RewardFunction
from ppo_engine.user_functions.importing import import_function

PROMPTS = ["Say a.", [{"role": "user", "content": "Say b, at some length."}], "Say c."]
RESPONSES = ["a", "bbbbbbbb", "ccc"]
FINISHED = [True, False, True]


def score(function, columns=None):
    return RewardFunction(function)(PROMPTS, RESPONSES, FINISHED, columns or {})


def test_a_function_sees_what_the_user_gave_and_its_scores_come_back():
    seen = []

    def length(prompts, responses):
        seen.extend(prompts)
        return [len(response) for response in responses]

    scores = score(length)
    assert seen == PROMPTS
    assert scores.dtype == torch.float32 and scores.tolist() == [1, 8, 3]


def test_only_the_columns_that_the_signature_names_are_passed():
    columns = {"answer": ["x", "y", "z"], "other": [1, 2, 3]}

    def named(prompts, responses, answer):
        assert answer == ["x", "y", "z"]
        return [0.0, 0.0, 0.0]

    def every(prompts, responses, **found):
        assert set(found) == {"answer", "other"}
        return [0.0, 0.0, 0.0]

    score(named, columns)
    score(every, columns)


def test_a_column_that_is_missing_is_named():
    def needy(prompts, responses, answer, hint=None):
        return [0.0] * len(responses)

    with pytest.raises(UserError, match="'needy' asks for 'answer', but the prompts have 'other'"):
        score(needy, {"other": [1, 2, 3]})


@pytest.mark.parametrize(
    "result",
    [(1, 2, 3), [True, False, 1.5], np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]),
     [np.float32(1), np.int64(2), torch.tensor(3.0)]],
    ids=["tuple", "bools", "numpy", "tensor", "scalars"],
)  # fmt: skip
def test_every_usual_kind_of_number_is_taken(result):
    assert score(lambda prompts, responses: result).tolist() == [float(x) for x in result]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "2 scores for 3 responses"),
        ([1.0, 2.0, 3.0, 4.0], "4 scores for 3 responses"),
        (None, r"returned None \(NoneType\); it must return a list of 3 numbers"),
        (1.5, r"returned 1.5 \(float\)"),
        ({"a": 1}, r"\(dict\)"),
        (torch.tensor(1.0), r"\(Tensor\)"),
        ([1.0, None, 3.0], r"None \(NoneType\) for response 1"),
        ([1.0, 2.0, math.nan], r"nan \(float\) for response 2"),
        ([-math.inf, 2.0, 3.0], r"-inf \(float\) for response 0"),
        ([1.0, "2.0", 3.0], r"'2.0' \(str\) for response 1"),
        ([1e300, 2.0, 3.0], r"1e\+300 \(float\) for response 0"),
        ([[1.0], [2.0], [3.0]], r"\[1.0\] \(list\) for response 0"),
        (torch.ones(3, 1), r"\[1.0\] \(list\) for response 0"),
    ],
)
def test_a_bad_result_is_described(result, message):
    def judge(prompts, responses):
        return result

    with pytest.raises(UserError, match=message) as caught:
        score(judge)
    assert "'judge'" in str(caught.value)


def test_an_exception_names_function_and_line_and_keeps_its_cause(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import json\n\ndef judge(prompts, responses):\n    return json.loads('nonsense')\n"
    )
    reward = RewardFunction(import_function(f"{tmp_path}/broken.py:judge"))
    with pytest.raises(UserError, match=r"broken\.py, line 4: JSONDecodeError") as caught:
        reward(PROMPTS, RESPONSES, FINISHED, {})
    assert isinstance(caught.value.__cause__, ValueError)


# Async functions ----------------------------------------------------------------------------------


class AsyncJudge:
    """Each response is judged concurrently; counts the calls."""

    calls = 0

    async def __call__(self, prompts, responses, bonus=None):
        self.calls += 1
        met = asyncio.Barrier(len(responses))  # a deadlock if one waited for the other

        async def one(response, extra):
            await asyncio.wait_for(met.wait(), 5)
            return len(response) + extra

        return await asyncio.gather(*map(one, responses, bonus or [0] * len(responses)))


def test_an_async_function_is_awaited_once_for_the_batch():
    judge = AsyncJudge()
    assert score(judge, {"bonus": [10, 20, 30]}).tolist() == [11, 28, 33]
    assert judge.calls == 1


def test_an_async_function_works_where_a_loop_runs_already():
    async def notebook():
        return score(AsyncJudge())

    assert asyncio.run(notebook()).tolist() == [1, 8, 3]


def test_what_async_functions_share_lasts_for_all_batches():
    one_at_a_time = asyncio.Semaphore(1)  # belongs to the loop in which it first made one wait

    async def judge(prompts, responses):
        async def one(response):
            async with one_at_a_time:
                await asyncio.sleep(0)
                return len(response)

        return await asyncio.gather(*map(one, responses))

    async def other(prompts, responses):
        return await judge(prompts, responses)

    async def notebook():
        return score(judge)

    batches = [score(judge), score(judge), score(other), asyncio.run(notebook())]
    assert [scores.tolist() for scores in batches] == [[1, 8, 3]] * 4


def test_an_interrupt_ends_an_async_function():
    ended = threading.Event()

    async def judge(prompts, responses):
        try:
            await asyncio.sleep(0.2)  # the score is waited for by now
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C
            await asyncio.sleep(60)
        finally:
            ended.set()

    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            score(judge)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.wait(5)


def test_an_async_function_that_fails_says_where(tmp_path):
    (tmp_path / "slow.py").write_text(
        "async def judge(prompts, responses):\n    return await other()\n\n"
        "async def other():\n    raise RuntimeError('no answer')\n"
    )
    reward = RewardFunction(import_function(f"{tmp_path}/slow.py:judge"), "slow.py:judge")
    message = r"'slow.py:judge' failed at .*slow\.py, line 5: RuntimeError: no answer"
    with pytest.raises(UserError, match=message):
        reward(PROMPTS, RESPONSES, FINISHED, {})


def test_an_async_function_with_a_bad_result_is_described():
    async def judge(prompts, responses):
        return [1.0]

    with pytest.raises(UserError, match="'judge' returned 1 scores for 3 responses"):
        score(judge)


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/absent.py:judge", "absent.py' does not exist"),
        ("{folder}/rewards.py:jugde", "no function 'jugde'. Did you mean 'judge'"),
        ("{folder}/rewards.py:LIMIT", r"'LIMIT' in .* is not a function, but 3 \(int\)"),
        ("{folder}/rewards.py:", "names no function"),
        ("{folder}/syntax.py:judge", "could not be imported: SyntaxError"),
        ("no_such_package.rewards:judge", "could not be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path, spec, message):
    (tmp_path / "rewards.py").write_text("def judge(prompts, responses): return []\nLIMIT = 3\n")
    (tmp_path / "syntax.py").write_text("def judge(:\n")
    with pytest.raises(UserError, match=message):
        import_function(spec.format(folder=tmp_path))


def test_a_file_runs_once_for_all_its_functions_until_it_changes(tmp_path):
    file = tmp_path / "judges.py"
    file.write_text("judge = object\ndef one(p, r): return judge\ndef two(p, r): return one\n")
    one, two = (import_function(f"{file}:{name}") for name in ("one", "two"))
    assert two(0, 0) is one
    os.utime(file, ns=(0, 0))
    assert import_function(f"{file}:one") is not one

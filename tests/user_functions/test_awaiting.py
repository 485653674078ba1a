"""Async functions as rewards: awaited once for a batch, in the thread that asks, on one loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from ppo_engine.errors import UserError
from ppo_engine.rewards.function import RewardFunction
from ppo_engine.user_functions.importing import import_function

RESPONSES = ["a", "bbbbbbbb", "ccc"]


def score(function, columns=None):
    reward = RewardFunction(function)
    return reward(["Say it."] * 3, RESPONSES, [True, False, True], columns or {})


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
    judge = import_function(f"{tmp_path}/slow.py:judge")
    message = r"'judge' failed at .*slow\.py, line 5: RuntimeError: no answer"
    with pytest.raises(UserError, match=message):
        score(judge)


def test_an_async_function_with_a_bad_result_is_described():
    async def judge(prompts, responses):
        return [1.0]

    with pytest.raises(UserError, match="'judge' returned 1 score for 3 responses"):
        score(judge)


def in_time(response: str, limit: float) -> float:
    """As verifiers of mathematics do: 0 where it takes too long, and whatever else goes wrong."""

    def stop(*_):
        raise TimeoutError

    try:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            time.sleep(len(response) / 10)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return 1.0
    except Exception:
        return 0.0


async def verify(prompts, responses):
    await asyncio.sleep(0)
    return [in_time(response, 0.5) for response in responses]


def verify_now(prompts, responses):
    return [in_time(response, 0.5) for response in responses]


def awaits_later(prompts, responses):
    return verify(prompts, responses)


@pytest.mark.parametrize("function", [verify, verify_now, awaits_later])
def test_a_verifier_can_set_an_alarm(function):
    assert score(function).tolist() == [1, 0, 1]


def test_an_interrupt_ends_an_async_function_beside_a_running_loop():
    """As in a notebook: the function runs in another thread."""
    ended = threading.Event()

    async def judge(prompts, responses):
        try:
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            ended.set()
            raise

    async def notebook():
        score(judge)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(notebook())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended.wait(5)


@pytest.mark.parametrize("error", [SystemExit(0), asyncio.CancelledError()], ids=repr)
def test_a_function_cannot_end_the_run_in_silence(error):
    async def judge(prompts, responses):
        raise error

    def judge_now(prompts, responses):
        raise error

    for function in (judge, judge_now):
        with pytest.raises(UserError, match=f"failed at .*: {type(error).__name__}"):
            score(function)
    assert score(AsyncJudge()).tolist() == [1, 8, 3]  # the loop goes on

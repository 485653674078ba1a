"""Python functions as rewards, sync or async: what they get, may return, and get wrong."""

from __future__ import annotations

import math

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
        (
            [1.0, 2.0, 10**400],
            r"1000.* \(int\) for response 2 \(counted from 0\), 'ccc'; .* finite",
        ),
        ([-(10**5000), 2.0, 3.0], r"… \(int\) for response 0"),
        ([1.0, 3.5e38, 3.0], r"3\.5e\+38 \(float\) for response 1 .* at most 3\.4e\+38"),
        (torch.ones(3, device="meta"), "whose numbers cannot be read: Cannot copy out of meta"),
        ([torch.ones((), device="meta")] * 3, "whose numbers cannot be read: .* on meta tensors"),
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


def leave(prompts, responses):
    raise SystemExit(3)


async def leave_later(prompts, responses):
    raise SystemExit(3)


def for_ever(prompts, responses):
    return for_ever(prompts, responses)


@pytest.mark.parametrize(
    ("function", "message"),
    [(leave, "SystemExit: 3"), (leave_later, "SystemExit: 3"), (for_ever, "RecursionError")],
)
def test_a_function_that_leaves_ends_with_a_message(function, message):
    name = function.__name__
    with pytest.raises(UserError, match=rf"'{name}' failed at .*test_function\.py, .*{message}"):
        score(function)


def interrupt(prompts, responses):
    raise KeyboardInterrupt


async def interrupt_later(prompts, responses):
    raise KeyboardInterrupt


@pytest.mark.parametrize("function", [interrupt, interrupt_later])
def test_ctrl_c_in_a_function_is_no_mistake_of_it(function):
    with pytest.raises(KeyboardInterrupt):
        score(function)

"""HTTP endpoints as rewards, against a real server: what is sent, and which answers are scores."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
from faults.http import tries
from http_server import Server, reply

from ppo_engine.errors import UserError
from ppo_engine.rewards.http import HTTPReward
from ppo_engine.settings.schema import RewardEndpointConfig

PROMPTS = ["Say a.", [{"role": "user", "content": "Say ü."}], "Say c."]
RESPONSES = ["a", "bbbbbbbb", "ccc"]
FINISHED = [True, False, True]
COLUMNS = {"answer": ["x", None, 3]}


def score(server: Server, **settings: Any) -> list[float]:
    reward = HTTPReward(server.url, RewardEndpointConfig(**settings))
    return reward(PROMPTS, RESPONSES, FINISHED, COLUMNS).tolist()


def test_a_batch_is_one_request(server: Server) -> None:
    assert score(server) == [1, 8, 3]
    expected = {"prompts": PROMPTS, "responses": RESPONSES, "finished": FINISHED}
    assert server.requests == [expected | {"columns": COLUMNS}]
    assert server.headers[0]["content-type"] == "application/json"


def test_requests_hold_at_most_batch_size_responses(server: Server) -> None:
    assert score(server, batch_size=2) == [1, 8, 3]
    assert [request["responses"] for request in server.requests] == [["a", "bbbbbbbb"], ["ccc"]]
    assert [request["columns"]["answer"] for request in server.requests] == [["x", None], [3]]
    assert [len(request["prompts"]) for request in server.requests] == [2, 1]
    assert [request["finished"] for request in server.requests] == [[True, False], [True]]


@pytest.mark.parametrize(
    "body",
    ['{"scores": [1, 2.5, -3]}', '{"rewards": [1, 2.5, -3], "why": {}}', "[1, 2.5, -3]"],
    ids=["scores", "rewards", "bare"],
)
def test_scores_by_either_name_or_bare(server: Server, body: str) -> None:
    server.last = reply(200, body)
    assert score(server) == [1, 2.5, -3]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>hello\n", r"answered 200, but not with valid JSON \(.*\): '<html>hello'"),
        ("[" * 200_000, r"not with valid JSON \(maximum recursion depth"),
        (f"[1, 2, {'9' * 5000}]", r"not with valid JSON \(Exceeds the limit"),
        ('{"scores": [1, 2, 3], "scores": [3, 2, 1]}', "the key 'scores' stands there twice"),
        ('{"score": [1, 2, 3]}', r"returned \{'score': \[1, 2, 3\]\} \(dict\); it must"),
        ('{"scores": [1, 2]}', "returned 2 scores for 3 responses"),
        ('{"scores": [1, null, 3]}', r"returned None \(NoneType\) for response 1 .*, 'bbbbbbbb':"),
        ('{"scores": [1, 2, NaN]}', r"returned nan \(float\) for response 2"),
        ('{"scores": [1, 2, 1e400]}', r"returned inf \(float\) for response 2"),
        (f'{{"scores": [1, 2, {10**400}]}}', r"returned 1000.*\(int\) for response 2"),
        ('{"scores": [1, 2, "3"]}', r"returned '3' \(str\) for response 2"),
        ('{"scores": [1, true, 3]}', r"returned True \(bool\) for response 1 .* number: 1 or 0"),
        ('{"scores": 1}', r"returned 1 \(int\)"),
    ],
)
def test_what_is_no_score_is_described(server: Server, body: str, message: str) -> None:
    server.last = reply(200, body)
    with pytest.raises(UserError, match=message) as caught:
        score(server)
    assert server.url in str(caught.value) and len(server.requests) == 1


def test_responses_are_counted_through_the_requests(server: Server) -> None:
    server.script = [reply(200, "[1, 2]"), reply(200, "[null]")]
    with pytest.raises(UserError, match=r"for response 2 .*, 'ccc'"):
        score(server, batch_size=2)


def test_a_batch_without_responses_asks_nobody(server: Server) -> None:
    assert HTTPReward(server.url, RewardEndpointConfig())([], [], [], {}).shape == (0,)
    assert not server.requests


@pytest.mark.parametrize("value", [float("nan"), datetime.date(2026, 1, 1), torch.ones(2)])
def test_columns_that_are_no_json_are_refused(server: Server, value: Any) -> None:
    reward = HTTPReward(server.url, RewardEndpointConfig())
    with pytest.raises(UserError, match="not valid JSON"):
        reward(PROMPTS, RESPONSES, FINISHED, {"x": [1.0, value, 2.0]})
    assert server.requests == []


def test_a_column_that_is_too_deep_is_refused(server: Server) -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(UserError, match="not valid JSON"):
        HTTPReward(server.url, RewardEndpointConfig())(["p"], ["r"], [True], {"x": [deep]})


def test_faults_of_servers() -> None:
    """Each once; `make faults` has more of them."""
    tried = tries(rounds=1, seed=1, deadline=0.25)
    assert not [f"{one.fault}: {one.ending}" for one in tried if one.wrong]

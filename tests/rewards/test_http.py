"""HTTP endpoints as rewards, against a real server: what is sent, taken, and tried again."""

from __future__ import annotations

import datetime
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from ppo_engine.errors import UserError
from ppo_engine.rewards import http as http_reward
from ppo_engine.rewards.http import HTTPReward
from ppo_engine.settings.files import shown_settings, shown_url
from ppo_engine.settings.schema import RewardEndpointConfig

PROMPTS = ["Say a.", [{"role": "user", "content": "Say ü."}], "Say c."]
RESPONSES = ["a", "bbbbbbbb", "ccc"]
FINISHED = [True, False, True]
COLUMNS = {"answer": ["x", None, 3]}

Answer = tuple[int, str]  # status and body


def lengths(request: dict[str, Any]) -> Answer:
    return 200, json.dumps({"scores": [len(response) for response in request["responses"]]})


class Server:
    """Answers with `answer`; what was asked is in `requests`."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], Answer] = lengths
        self.retry_after: str | None = None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                owner.requests.append(json.loads(body))
                status, text = owner.answer(owner.requests[-1])
                if status == 0:  # hang up
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "http://elsewhere/score")
                if status == 503 and owner.retry_after:
                    self.send_header("Retry-After", owner.retry_after)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def score(self, **settings: Any) -> list[float]:
        reward = HTTPReward(self.url, RewardEndpointConfig(**settings))
        return reward(PROMPTS, RESPONSES, FINISHED, COLUMNS).tolist()

    def answer_in_turn(self, *answers: Answer | Callable[[dict[str, Any]], Answer]) -> None:
        """These, then lengths."""
        left = list(answers)

        def answer(request: dict[str, Any]) -> Answer:
            following = left.pop(0) if left else lengths
            return following(request) if callable(following) else following

        self.answer = answer


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_reward, "_BACKOFF", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")


def test_a_batch_is_one_request(server: Server) -> None:
    assert server.score() == [1, 8, 3]
    expected = {"prompts": PROMPTS, "responses": RESPONSES, "finished": FINISHED}
    assert server.requests == [expected | {"columns": COLUMNS}]


def test_requests_hold_at_most_batch_size_responses(server: Server) -> None:
    assert server.score(batch_size=2) == [1, 8, 3]
    assert [request["responses"] for request in server.requests] == [["a", "bbbbbbbb"], ["ccc"]]
    assert [request["columns"]["answer"] for request in server.requests] == [["x", None], [3]]
    assert [len(request["prompts"]) for request in server.requests] == [2, 1]
    assert [request["finished"] for request in server.requests] == [[True, False], [True]]


@pytest.mark.parametrize("body", ['{"scores": [1, 2.5, -3]}', '{"rewards": [1, 2.5, -3]}'])
def test_scores_by_either_name_or_bare(server: Server, body: str) -> None:
    server.answer = lambda _: (200, body)
    assert server.score() == [1, 2.5, -3]
    server.answer = lambda _: (200, "[1, 2.5, -3]")
    assert server.score() == [1, 2.5, -3]


@pytest.mark.parametrize(
    "failure", [(429, ""), (500, "busy"), (503, ""), (0, "")], ids=["429", "500", "503", "hang up"]
)
def test_what_may_pass_is_tried_again(server: Server, failure: Answer) -> None:
    server.answer_in_turn(failure, failure)
    assert server.score() == [1, 8, 3]
    assert len(server.requests) == 3 and server.requests[2] == server.requests[0]


@pytest.mark.parametrize("asked", ["21600", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_server_cannot_ask_for_a_wait_of_hours(
    server: Server, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    server.retry_after = asked
    server.answer_in_turn((503, ""))
    assert server.score() == [1, 8, 3]
    assert waits == [60]


@pytest.mark.parametrize("failure", [(400, ""), (404, ""), (422, "")])
def test_what_will_not_pass_is_not_tried_again(server: Server, failure: Answer) -> None:
    server.answer_in_turn(failure)
    with pytest.raises(UserError):
        server.score()
    assert len(server.requests) == 1


def test_an_endpoint_that_starts_late_is_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retries are real: with their waits, a server that comes up half a second late."""
    monkeypatch.setattr(http_reward, "_BACKOFF", 0.25)  # after 0 and 0.5 s
    port = server.server.server_port
    server.server.shutdown()
    server.server.server_close()

    def start() -> None:
        time.sleep(0.3)
        server.server = ThreadingHTTPServer(("127.0.0.1", port), server.server.RequestHandlerClass)
        server.server.serve_forever()

    threading.Thread(target=start, daemon=True).start()
    assert server.score() == [1, 8, 3]


def set_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A proxy that the environment names for everything; it answers like a reward."""
    found = Server()
    set_proxy(monkeypatch, found.url.removesuffix("/score"))
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "0.0.0.0"])
def test_this_machine_is_not_asked_through_a_proxy(
    server: Server, proxy: Server, host: str
) -> None:
    server.url = server.url.replace("127.0.0.1", host)
    assert server.score() == [1, 8, 3]
    assert len(server.requests) == 1 and not proxy.requests


def test_others_are_asked_through_the_proxy(
    server: Server, proxy: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.url = "http://judge.invalid/score"
    assert server.score() == [1, 8, 3]
    assert len(proxy.requests) == 1
    monkeypatch.setenv("no_proxy", "judge.invalid")
    with pytest.raises(UserError, match=r"cannot be reached: .* server running"):
        server.score()
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.1.2.3", True),
        ("::1", True),
        ("::", True),
        ("::ffff:127.0.0.1", True),
        ("judge.localhost", True),
        ("localhost.", True),
        ("10.0.0.5", False),
        ("localhost.example.com", False),
        ("notlocalhost", False),
        ("::2", False),
    ],
)
def test_which_hosts_are_this_machine(host: str, here: bool) -> None:
    assert http_reward._is_here(host) == here


def test_a_proxy_that_fails_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        set_proxy(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
    server.url = "http://judge.invalid/score"
    with pytest.raises(UserError, match=r"through the proxy .* set NO_PROXY=judge\.invalid"):
        server.score()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, "boom\nTraceback"), r"answered 500 Internal Server Error: 'boom'\. .* server's log"),
        ((404, ""), r"answered 404 Not Found, with an empty body\. It must take POST requests"),
        ((308, ""), r"answered 308 .* points to: http://elsewhere/score"),
        ((200, "<html>hello\n"), r"answered 200, but not with JSON: '<html>hello'"),
        ((200, '{"score": [1, 2, 3]}'), r"returned \{'score': \[1, 2, 3\]\} \(dict\); it must"),
        ((200, '{"scores": [1, 2]}'), "returned 2 scores for 3 responses"),
        ((200, '{"scores": [1, null, 3]}'), r"returned None \(NoneType\) for response 1"),
        ((200, '{"scores": [1, 2, NaN]}'), r"returned nan \(float\) for response 2"),
        ((200, '{"scores": 1}'), r"returned 1 \(int\)"),
    ],
)
def test_a_bad_answer_is_described(server: Server, answer: Answer, message: str) -> None:
    server.answer = lambda _: answer
    with pytest.raises(UserError, match=message) as caught:
        server.score()
    assert server.url in str(caught.value)


def test_an_endpoint_that_takes_too_long(server: Server) -> None:
    def slow(request: dict[str, Any]) -> Answer:
        time.sleep(0.5)
        return lengths(request)

    server.answer = slow
    with pytest.raises(
        UserError, match=r"not answer within 0\.1 s, .* Raise reward\.http\.timeout"
    ):
        server.score(timeout=0.1)
    assert len(server.requests) == 3  # each may have cost the server its work


def test_an_endpoint_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    reward = HTTPReward(f"http://me:secret@127.0.0.1:{port}/score", RewardEndpointConfig())
    message = rf"http://127\.0\.0\.1:{port}/score cannot be reached: .*refused.* server running"
    with pytest.raises(UserError, match=message) as caught:
        reward(PROMPTS, RESPONSES, FINISHED, {})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), datetime.date(2026, 1, 1), torch.ones(2)])
def test_columns_that_are_no_json_are_refused(server: Server, value: Any) -> None:
    reward = HTTPReward(server.url, RewardEndpointConfig())
    with pytest.raises(UserError, match="not valid JSON"):
        reward(PROMPTS, RESPONSES, FINISHED, {"x": [1.0, value, 2.0]})
    assert server.requests == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("http://me:secret@host:80/x", "http://host:80/x"),
        ("https://host/x?token=secret#secret", "https://host/x?…"),
        ("http://me:secret@host:99999/x", "http://…"),
        ("http://me:sec/ret@host/x", "http://…"),
        ("http://host:port/x", "http://host:port/x"),
        ("/x?token=secret", "/x?…"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    settings = {"reward": {"url": url, "sources": [{"url": url, "name": url}, {"url": None}]}}
    [first, second] = shown_settings(settings)["reward"]["sources"]
    assert shown_settings(settings)["reward"]["url"] == first["url"] == shown
    assert first["name"] == url and second == {"url": None}


def test_no_message_tells_a_secret(server: Server) -> None:
    at = server.url.removeprefix("http://")
    failures = {"http://me:secret@host:99999/x": 0, f"http://me:secret@{at}?secret": 404}
    for url, status in failures.items():
        server.answer = lambda _, status=status: (status, "")
        with pytest.raises(UserError) as caught:
            HTTPReward(url, RewardEndpointConfig())(PROMPTS, RESPONSES, FINISHED, {})
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "https:///score", "http://host:port/", "http://[::1"])
def test_a_url_without_a_host_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not a valid URL"):
        HTTPReward(url, RewardEndpointConfig())

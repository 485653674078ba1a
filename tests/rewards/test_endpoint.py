"""How an endpoint is asked, against a real server: by when, how often, which way, and by whom."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import threading
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from faults.http import HANGING, PASSING, SLACK, bomb
from http_server import Reply, Server, free_port, raw, reply, score

from ppo_engine.errors import UserError
from ppo_engine.rewards import endpoint

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_what_may_pass_is_tried_again(server: Server, status: int) -> None:
    server.script = [reply(status, "busy"), reply(status)]
    assert score(server.url) == [1, 8, 3]
    assert len(server.requests) == 3 and server.requests[2] == server.requests[0]


@pytest.mark.parametrize("fault", [name for name in PASSING if "breaks" in name or "gzip" in name])
def test_a_reply_that_breaks_off_is_asked_for_again(server: Server, fault: str) -> None:
    server.script = [PASSING[fault]] * 2
    assert score(server.url) == [1, 8, 3]
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_will_not_pass_is_not_tried_again(server: Server, status: int) -> None:
    server.script = [reply(status)]
    with pytest.raises(UserError):
        score(server.url)
    assert len(server.requests) == 1


def test_waits_double_and_none_is_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 1.0)
    drawn = [[*itertools.islice(endpoint._waits(), 6)] for _ in range(50)]
    for waits in drawn:
        assert waits[0] == 0
        assert all(
            longest / 2 <= w <= longest
            for w, longest in zip(waits[1:], (1, 2, 4, 8, 16), strict=True)
        )
    assert len({waits[1] for waits in drawn}) > 40


def test_an_endpoint_that_starts_late_is_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.25)
    server.close()
    threading.Timer(0.3, server.listen, [server.port]).start()
    assert score(server.url) == [1, 8, 3]


def later(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("asked", "at_least"),
    [("1", 1.0), (3, 1.0), ("-1", 0), ("soon", 0), ("1e3", 0), ("²", 0), (-9, 0)],
    ids=["seconds", "date", "negative", "word", "float", "digit of another kind", "past date"],
)  # fmt: skip
def test_retry_after_in_both_forms(server: Server, asked: str | int, at_least: float) -> None:
    """What is neither is passed over."""
    text = asked if isinstance(asked, str) else later(asked)  # which has whole seconds
    server.script = [reply(503, "busy", Retry_After=text)]
    began = time.monotonic()
    assert score(server.url) == [1, 8, 3]
    assert at_least <= time.monotonic() - began < at_least + 2 + SLACK


@pytest.mark.parametrize("asked", ["21600", "9" * 400, "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_wait_beyond_the_deadline_ends_the_run(server: Server, asked: str) -> None:
    server.last = reply(503, "busy", Retry_After=asked)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"asks to wait .* s, longer than reward\.http\.timeout=60"):
        score(server.url)
    assert time.monotonic() - began < 5 and len(server.requests) == 1


MISSING = {
    "hangs": "answer", "drips 1xx lines": "answer", "drips headers": "answer",
    "hangs in the body": "finish its answer", "drips a body": "finish its answer",
}  # fmt: skip


@pytest.mark.parametrize(("fault", "missing"), MISSING.items())
def test_the_deadline_is_for_the_whole_request(server: Server, fault: str, missing: str) -> None:
    server.last = HANGING[fault]
    began = time.monotonic()
    message = rf"did not {missing} within 1 s, in 1 attempt\. Raise reward\.http\.timeout"
    with pytest.raises(UserError, match=message):
        score(server.url, timeout=1.0)
    assert time.monotonic() - began < 1 + SLACK


def test_the_deadline_is_for_all_attempts(server: Server) -> None:
    def slow(connection: socket.socket, request: dict[str, Any]) -> None:
        time.sleep(1.0)
        reply(500, "boom")(connection, request)

    server.last = slow
    began = time.monotonic()
    with pytest.raises(UserError, match=r"did not answer within 1\.8 s, in 2 attempts; .*'boom'"):
        score(server.url, timeout=1.8)
    assert time.monotonic() - began < 1.8 + SLACK


def test_waits_end_before_the_deadline(server: Server) -> None:
    server.last = reply(500)
    began = time.monotonic()
    with pytest.raises(UserError, match="answered 500"):
        score(server.url, timeout=0.5)
    assert time.monotonic() - began < 0.5 + SLACK and len(server.requests) > 3


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_accepts_and_says_nothing(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"{scheme}://127.0.0.1:{mute.getsockname()[1]}/"
        missing = {"http": "answer", "https": r"agree on TLS within .* Is the server running"}
        with pytest.raises(UserError, match=f"did not {missing[scheme]}"):
            score(url, timeout=0.2)


def test_ctrl_c_ends_a_request(server: Server) -> None:
    server.last = HANGING["hangs"]
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        score(server.url)
    assert time.monotonic() - began < 0.5 + SLACK


def test_requests_work_where_a_loop_runs_already(server: Server) -> None:
    async def notebook() -> list[float]:
        return score(server.url)

    assert asyncio.run(notebook()) == [1, 8, 3]


def peak(url: str, message: str) -> float:
    """Of memory, in MiB, in a request that is refused with that message."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            score(url)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("status", [200, 404])
def test_a_reply_is_not_inflated_beyond_the_limit(server: Server, status: int) -> None:
    server.last = reply(status, bomb(300), Content_Encoding="gzip")
    message = {200: "more than 16 MiB, and was not read", 404: "answered 404"}
    assert peak(server.url, message[status]) < 60
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(404), r"answered 404 Reason, with an empty body\. It must take POST requests"),
        (reply(401, "who?"), r"answered 401 Reason: 'who\?'\. Name the .*reward\.http\.token_env"),
        (reply(308, Location="http://me:x@elsewhere/y"), "points to: http://elsewhere/y"),
        (reply(500, "boom\nTrace"), r"answered 500 Reason: 'boom', in 3 attempts within 0\.\d s"),
        (raw(), "gave no valid HTTP answer: Server disconnected"),
        (raw(b"hello\r\n\r\n"), "gave no valid HTTP answer: illegal status line"),
        (PASSING["breaks off in the body"], r"broke off its answer: .*\(received 5 bytes"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("thrice")
def test_what_went_wrong_is_told(server: Server, answer: Reply, message: str) -> None:
    server.last = answer
    with pytest.raises(UserError, match=message) as caught:
        score(server.url)
    assert server.url in str(caught.value)


@pytest.mark.usefixtures("thrice")
def test_an_endpoint_that_is_not_there() -> None:
    message = r"/score cannot be reached: Connection refused, in 3 attempts .* server running\?"
    with pytest.raises(UserError, match=message):
        score(f"http://127.0.0.1:{free_port()}/score")

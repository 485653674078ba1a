"""How an endpoint is asked, against a real server: by when, how often, which way, and by whom."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from faults.http import HANGING, PASSING, SLACK, bomb
from http_server import Reply, Server, raw, reply, scores

from ppo_engine.errors import UserError
from ppo_engine.rewards import access, endpoint
from ppo_engine.rewards.http import HTTPReward
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.settings.files import dump_config, shown_settings, shown_url
from ppo_engine.settings.schema import (
    GenerateConfig,
    RewardConfig,
    RewardEndpointConfig,
    RewardSource,
)

TRUSTED = functools.cache(access.authorities)  # which takes a while
RESPONSES = ["a", "bbbbbbbb", "ccc"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short waits, and nothing of the reader's own proxies and credentials."""
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "authorities", TRUSTED)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def thrice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three attempts at once, and no time for a fourth."""
    monkeypatch.setattr(endpoint, "_waits", lambda: iter([0, 0, 99]))


def score(url: str, **settings: Any) -> list[float]:
    reward = HTTPReward(url, RewardEndpointConfig(**settings))
    return reward(["p"] * 3, RESPONSES, [True] * 3, {}).tolist()


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


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@pytest.mark.usefixtures("thrice")
def test_an_endpoint_that_is_not_there() -> None:
    message = r"/score cannot be reached: Connection refused, in 3 attempts .* server running\?"
    with pytest.raises(UserError, match=message):
        score(f"http://127.0.0.1:{free_port()}/score")


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
    found.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "0.0.0.0"])
def test_this_machine_is_not_asked_through_a_proxy(
    server: Server, proxy: Server, host: str
) -> None:
    assert score(server.url.replace("127.0.0.1", host)) == [1, 8, 3]
    assert len(server.requests) == 1 and not proxy.requests


@pytest.mark.usefixtures("thrice")
@pytest.mark.parametrize("excepted", ["judge.invalid", ".invalid", "10.0.0.0/8,invalid"])
def test_others_are_asked_through_the_proxy(
    proxy: Server, monkeypatch: pytest.MonkeyPatch, excepted: str
) -> None:
    assert score("http://judge.invalid/score") == [1, 8, 3]
    assert len(proxy.requests) == 1
    monkeypatch.setenv("no_proxy", excepted)
    with pytest.raises(UserError, match=r"cannot be reached: .* server running"):
        score("http://judge.invalid/score")
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
    assert access.is_here(host) == here


@pytest.mark.usefixtures("thrice")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    set_proxy(monkeypatch, f"http://127.0.0.1:{free_port()}")
    message = r"through the proxy .*: Connection refused.* set NO_PROXY=judge\.invalid"
    with pytest.raises(UserError, match=message):
        score(f"{scheme}://judge.invalid/score")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, signed by itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    key, certificate = file.with_suffix(".key"), file.with_suffix(".crt")
    command = f"""openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2
        -subj /CN=judge -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"""
    subprocess.run(command.split(), check=True, capture_output=True)
    file.write_text(key.read_text() + certificate.read_text())
    return file


def test_certificates_are_verified(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(context)
    monkeypatch.setattr(endpoint, "authorities", access.authorities)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(UserError, match=r"cannot be trusted: self.signed .* SSL_CERT_FILE"):
        score(server.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert score(server.url) == [1, 8, 3]
    with pytest.raises(UserError, match=r"certificate that cannot be trusted: .*localhost"):
        score(server.url.replace("127.0.0.1", "localhost"))
    assert len(server.requests) == 1
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    with pytest.raises(UserError, match="SSL_CERT_FILE or SSL_CERT_DIR cannot be read"):
        score(server.url)
    server.close()


def test_a_token_of_the_environment_is_sent_and_told_to_nobody_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Server()
    monkeypatch.setenv("JUDGE", " secret-of-mine\n")
    server.script = [scores, reply(308, Location=elsewhere.url), reply(403, "no secret-of-mine")]
    assert score(server.url, token_env="JUDGE") == [1, 8, 3]
    assert server.headers[0]["authorization"] == "Bearer secret-of-mine"
    for message in ("answered 308", "answered 403 Reason: 'no …'"):
        with pytest.raises(UserError, match=message) as caught:
            score(server.url, token_env="JUDGE")
        assert "secret" not in str(caught.value)
    assert not elsewhere.requests
    elsewhere.close()
    config = GenerateConfig(reward=RewardConfig(http=RewardEndpointConfig(token_env="JUDGE")))
    assert "token_env: JUDGE" in dump_config(config) and "secret" not in dump_config(config)


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "no token in 'JUDGE'"), (" ", "no token in 'JUDGE'"), ("a b", "is no token"),
     ("a\r\nX: 1", "is no token"), ("ü", "is no token")],
)  # fmt: skip
def test_what_is_no_token(monkeypatch: pytest.MonkeyPatch, value: str | None, message: str) -> None:
    if value is not None:
        monkeypatch.setenv("JUDGE", value)
    with pytest.raises(UserError, match=message):
        score("http://localhost:1/", token_env="JUDGE")


def test_one_token_is_for_one_host() -> None:
    urls = ["http://a/x", "http://a/y", "http://me:secret@b/"]
    config = RewardConfig(
        sources=[RewardSource(url=url) for url in urls[:2]],
        http=RewardEndpointConfig(token_env="JUDGE"),
    )
    assert len(configured_sources(config)) == 2
    config.sources.append(RewardSource(url=urls[2]))
    with pytest.raises(UserError, match="one token, which a and b would all be sent"):
        configured_sources(config)


def test_netrc_gives_a_user_and_a_password(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(file))
    monkeypatch.setenv("JUDGE", "token")
    score(server.url)
    score(server.url, token_env="JUDGE")
    file.write_text("machine elsewhere login me password secret\n")
    score(server.url)
    file.write_text("nonsense")
    score(server.url)
    sent = [headers.get("authorization") for headers in server.headers]
    assert sent == ["Basic bWU6c2VjcmV0", "Bearer token", None, None]


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


@pytest.mark.usefixtures("thrice")
def test_no_message_tells_a_secret(server: Server) -> None:
    at = server.url.removeprefix("http://")
    server.last = reply(404)
    refused = {
        "http://me:secret@host:99999/x": "is not a valid URL",
        f"http://me:secret@{at}": r"config\.yaml would keep them: put both into ~/\.netrc",
        f"http://{at}?secret": r"/score\?… answered 404",
        f"http://127.0.0.1:{free_port()}?secret": r"\?… cannot be reached",
    }
    for url, message in refused.items():
        with pytest.raises(UserError, match=message) as caught:
            score(url)
        assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url", ["http://", "https:///score", "http://host:port/", "http://[::1", "ftp://host/x", "host"]
)  # fmt: skip
def test_a_url_without_a_host_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not a valid URL"):
        HTTPReward(url, RewardEndpointConfig())

"""The way to an endpoint, who asks, and what is never told, against a real server."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import Server, free_port, reply, score, scores

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

pytestmark = pytest.mark.usefixtures("surroundings")


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


@pytest.mark.parametrize("url", ["gopher://judge", "http://[::1", "http://judge:port"])
def test_a_proxy_that_is_none(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    set_proxy(monkeypatch, url)
    with pytest.raises(UserError, match=r"proxy .* cannot be used: .* NO_PROXY=judge\.invalid"):
        score("http://judge.invalid/score")


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

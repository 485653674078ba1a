"""Fixtures of tests that ask a real server."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import Server

from ppo_engine.rewards import access, endpoint

TRUSTED = functools.cache(access.authorities)  # which takes a while


@pytest.fixture
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

"""A server on this machine that replies as it is told, down to the bytes on the wire."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from ppo_engine.rewards.http import HTTPReward
from ppo_engine.settings.schema import RewardEndpointConfig

RESPONSES = ["a", "bbbbbbbb", "ccc"]
Reply = Callable[[socket.socket, dict[str, Any]], None]


def reply(status: int, body: str | bytes = b"", **headers: str) -> Reply:
    """One with that status, body and headers (`_` for `-` in their names)."""
    content = body.encode() if isinstance(body, str) else body
    # Said, as a client that kept the connection might send its next request while this one closes.
    lines = {"Content-Length": str(len(content)), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"HTTP/1.1 {status} Reason\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    return raw(head.encode() + b"\r\n" + content)


def raw(*parts: bytes) -> Reply:
    """Bytes, whatever they are."""

    def send(connection: socket.socket, _: dict[str, Any]) -> None:
        for part in parts:
            connection.sendall(part)

    return send


def scores(connection: socket.socket, request: dict[str, Any]) -> None:
    """What is asked for: each response's length."""
    found = [len(response) for response in request["responses"]]
    reply(200, json.dumps({"scores": found}))(connection, request)


class Server:
    """Plays `script`, a reply to each request, then `last` for ever; keeps what it was asked."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.script: list[Reply] = []
        self.last: Reply = scores
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._tls = tls
        self.listen(0)

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}/score"

    def listen(self, port: int) -> None:
        self._socket = socket.create_server(("127.0.0.1", port), backlog=64)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends the wait for a connection
        self._socket.close()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as asked:
                asked.readline()  # POST
                lines = iter(asked.readline, b"\r\n")
                pairs = (line.decode().strip().partition(": ") for line in lines)
                headers = {name.lower(): value for name, _, value in pairs}
                body = asked.read(int(headers["content-length"]))
                self.headers.append(headers)
                self.requests.append(json.loads(body))
                following = self.script.pop(0) if self.script else self.last
                following(connection, self.requests[-1])


def score(url: str, **settings: Any) -> list[float]:
    """What the server there, asked as a reward, says of RESPONSES."""
    reward = HTTPReward(url, RewardEndpointConfig(**settings))
    return reward(["p"] * 3, RESPONSES, [True] * 3, {}).tolist()


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]

"""What servers do to a request for scores: hang, drip, break off, lie, or flood.

After each fault the server answers well, as one does that was restarted, or goes on with the fault.
Scores must come from the server, all of a batch or none, and nothing may take longer than the
deadline.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from http_server import Reply, Server, raw, reply

from faults import REFUSED, SURVIVED, Try
from ppo_engine.errors import UserError
from ppo_engine.rewards import endpoint
from ppo_engine.rewards.http import HTTPReward
from ppo_engine.settings.schema import RewardEndpointConfig

_HEAD = b"HTTP/1.1 200 OK\r\n"
SLACK = 2.0  # seconds over the deadline, of a machine that does other things too


def _for_ever(first: bytes, piece: bytes, pause: float = 0.03) -> Reply:
    def send(connection: socket.socket, _: dict[str, Any]) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return send


def _hang(connection: socket.socket, _: dict[str, Any]) -> None:
    connection.recv(1)  # until the other side goes


def _hang_in_the_body(connection: socket.socket, request: dict[str, Any]) -> None:
    connection.sendall(_HEAD + b"Content-Length: 9\r\n\r\n[1,")
    _hang(connection, request)


def _reset(connection: socket.socket, _: dict[str, Any]) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _of_scores(change: Callable[[list[float]], Any]) -> Reply:
    """The right scores, changed."""

    def send(connection: socket.socket, request: dict[str, Any]) -> None:
        right = [float(len(response)) for response in request["responses"]]
        found = change(right)
        text = found if isinstance(found, str) else json.dumps({"scores": found})
        reply(200, text)(connection, request)

    return send


def _first(value: Any) -> Reply:
    return _of_scores(lambda right: [value, *right[1:]])


def bomb(mebibytes: int) -> bytes:
    """Zeros that inflate to so much. Pieces of a stream that know nothing of each other are equal:
    one is made, and repeated."""
    stream = zlib.compressobj(9, wbits=31)
    head, piece = (
        stream.compress(bytes(1 << 20)) + stream.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    return head + piece * (mebibytes - 1)


# What passes: asked again, the server answers.
PASSING: dict[str, Reply] = {
    "503": reply(503, "busy"),
    "Retry-After that is none": reply(503, "busy", Retry_After="soon"),
    "Retry-After that has passed": reply(429, "", Retry_After="Fri, 01 Jan 2010 00:00:00 GMT"),
    "hangs up": raw(),
    "resets": _reset,
    "no HTTP": raw(b"hello\r\n\r\n"),
    "breaks off in the headers": raw(_HEAD + b"Content-Le"),
    "breaks off in the body": raw(_HEAD + b"Content-Length: 99\r\n\r\n[1, 2"),
    "breaks off in a chunk": raw(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\n[1, 2"),
    "broken gzip": reply(200, "no gzip", Content_Encoding="gzip"),
    "headers of 200 kB": raw(_HEAD, b"X: " + b"x" * 200_000),
}  # fmt: skip
# What holds the request, for ever.
HANGING: dict[str, Reply] = {
    "hangs": _hang,
    "hangs in the body": _hang_in_the_body,
    "drips headers": _for_ever(_HEAD, b"X"),
    "drips a body": _for_ever(_HEAD + b"Content-Length: 99999\r\n\r\n", b" "),
    "drips chunks": _for_ever(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "drips 1xx lines": _for_ever(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "floods 1xx lines": _for_ever(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 999, 0),
    "asks for a wait of 6 hours": reply(503, "busy", Retry_After="21600"),
    "asks for a wait until 2100": reply(503, "", Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"),
}
# What is no answer, and would be none the next time.
LYING: dict[str, Reply] = {
    "404": reply(404),
    "a redirect": reply(308, "", Location="http://127.0.0.1:1/"),
    "no JSON": reply(200, "<html>"),
    "no UTF-8": reply(200, b'{"scores": [1], "\xff": 1}'),
    "JSON that breaks off": _of_scores(lambda right: json.dumps({"scores": right})[:-1]),
    "JSON of 200,000 levels": reply(200, "[" * 200_000 + "]" * 200_000),
    "a key twice": _of_scores(lambda right: f'{{"scores": {right}, "scores": {right}}}'),
    "a number of 5,000 digits": reply(200, f'{{"scores": [{"9" * 5000}]}}'),
    "10**400": _first(10**400),
    "1e39": _first(1e39),
    "NaN": _first(float("nan")),
    "infinity": _first(float("inf")),
    "true": _first(True),
    "null": _first(None),
    "text": _first("1"),
    "a list in the list": _first([1.0]),
    "one score too few": _of_scores(lambda right: right[1:]),
    "one score too many": _of_scores(lambda right: [*right, 1.0]),
    "no scores": _of_scores(lambda right: json.dumps({"score": right})),
    "a number for a list": _of_scores(lambda right: 1.0),
    "20 MiB": reply(200, b" " * (20 << 20) + b"[1]"),
    "a body without an end": _for_ever(_HEAD + b"\r\n", b" " * 100_000, 0),
    "gzip of 300 MiB": reply(200, bomb(300), Content_Encoding="gzip"),
}


def tries(rounds: int = 10, seed: int = 0, deadline: float = 0.5) -> Iterator[Try]:
    """Each fault in each round; the server has other passing ones before it, or answers well at
    first. What hangs does so until the `deadline`, in seconds."""
    draw = random.Random(seed)
    server = Server()
    patient = endpoint._FIRST_WAIT
    endpoint._FIRST_WAIT = 0.01
    try:
        for _ in range(rounds):
            for name in (*PASSING, *HANGING, *LYING):
                yield Try(name, _ending(server, name, draw, deadline))
    finally:
        endpoint._FIRST_WAIT = patient
        server.close()


def _ending(server: Server, name: str, draw: random.Random, deadline: float) -> str:
    before = [PASSING[draw.choice([*PASSING])] for _ in range(draw.randrange(3))]
    well = [server.last] * draw.randrange(2)  # the first request of the batch
    fault = (PASSING | HANGING | LYING)[name]
    server.script = well + before + [fault] * (1 if name in PASSING else 99)
    responses = ["x" * draw.randrange(50) for _ in range(draw.randrange(3, 7))]
    timeout = deadline if name in HANGING else 30.0
    reward = HTTPReward(server.url, RewardEndpointConfig(timeout=timeout, batch_size=2))
    began = time.monotonic()
    try:
        found = reward(["p"] * len(responses), responses, [True] * len(responses), {}).tolist()
    except UserError as error:
        if name in PASSING:
            return f"refused: {error}"
    except Exception as error:
        return f"a traceback: {type(error).__name__}: {error}"
    else:
        if name not in PASSING or found != [len(response) for response in responses]:
            return f"scored {found}"
    took = time.monotonic() - began
    if took > timeout + SLACK:
        return f"took {took:.1f} s, of {timeout:g}"
    return SURVIVED if name in PASSING else REFUSED

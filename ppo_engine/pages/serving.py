"""A page's server, from its address to Ctrl-C."""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from ppo_engine.errors import UserError
from ppo_engine.pages.guard import Guard, new_token
from ppo_engine.run.interrupts import stopped_by_signals

LOOPBACK = "127.0.0.1"
_OPEN_TO_OTHERS = (
    "Whoever has this address and reaches this machine can open it, and what is sent can be read "
    "on the way."
)


def serve(
    make: Callable[[str], ASGIApp], what: str, *, host: str, port: int, browser: bool
) -> None:
    """Serve the app that `make` makes of its token, until Ctrl-C.

    Prints the address (`what` says what is there) as soon as it answers, and opens it in a
    `browser`. Port 0 is any that is free. Raises a UserError where it cannot be had.
    """
    token = new_token()
    listening = _listen(host, port)
    address = f"http://{_named(host)}:{listening.getsockname()[1]}/{token}/"
    config = uvicorn.Config(
        Guard(make(token), token, host),
        log_level="warning",
        access_log=False,  # which would have the token
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )

    def tell() -> None:
        print(f"{what} {address}", flush=True)
        if host != LOOPBACK:
            print(_OPEN_TO_OTHERS, file=sys.stderr)
        if browser and has_browser():
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    # uvicorn raises Ctrl-C again when it has ended.
    with suppress(KeyboardInterrupt), listening, stopped_by_signals():
        _Server(config, tell).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Calls `tell` as soon as it answers."""

    def __init__(self, config: uvicorn.Config, tell: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = tell

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()


def has_browser() -> bool:
    """Whether one can be opened beside the terminal; one within it would only be in the way."""
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port must be 0 (any that is free) to 65535, not {port}.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(
            f"Port {port} of {host} cannot be had: {error.strerror}. Choose another --port (0 is "
            "any that is free), or --host."
        ) from error


def _named(host: str) -> str:
    """The host in an address that leads to it."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host

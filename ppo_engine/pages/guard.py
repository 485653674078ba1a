"""Who may ask a page's server: a browser that was given its address, on a page of its own."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 1 << 20  # bytes
_HEADERS = {
    # Nothing but the page's own files, and no script or style within it: texts are untrusted.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # whose path holds the token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_READING = ("GET", "HEAD")


def new_token() -> str:
    """The part of an address that nobody guesses."""
    return secrets.token_urlsafe(24)


class Guard:
    """Asks `app` for what comes with the token as the first part of its path, and refuses the rest:

    - a `Host` that is not this server's: another site's name that leads here (DNS rebinding);
    - what changes something, without an `Origin` or with another: another site's page sends it;
    - a body of no known length, or a long one.

    Every answer forbids what the page does not need.
    """

    def __init__(self, app: ASGIApp, token: str, host: str) -> None:
        """`host` is what the server listens on."""
        self._app, self._token, self._host = app, token, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, guarded)
        else:
            status, text = refusal
            await PlainTextResponse(text + "\n", status)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not is_own_name(host, self._host):
            return 421, f"This server is not {host[:80]!r}: open the address that it printed."
        given = scope["path"].split("/")[1].encode()
        if not secrets.compare_digest(given, self._token.encode()):
            return 404, "Nothing is here. The address that was printed has more to it."
        if scope["method"] in _READING:
            return None
        if headers.get("origin") != f"http://{host}":
            return 403, "Only the page itself may send this."
        length = headers.get("content-length", "")
        if not (length.isdecimal() and int(length) <= LARGEST_BODY):
            return 413, f"Not more than {LARGEST_BODY} bytes, of a length that is told."
        return None


def is_own_name(header: str, listening: str) -> bool:
    """Whether a `Host` header names the server that listens on `listening`, at any port (which a
    tunnel may change). Loopback names do; one that listens on all addresses has those as well, as
    numbers, and the machine's name."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if name in (listening.lower(), "localhost") or _is(name, "is_loopback"):
        return True
    if not _is(listening, "is_unspecified"):
        return False
    return name == socket.gethostname().lower() or _is(name, "version")


def _is(name: str, what: str) -> bool:
    """Whether it is an IP address, and that is true of it."""
    try:
        return bool(getattr(ipaddress.ip_address(name), what))
    except ValueError:
        return False

"""A server that is asked by POST, and is done with by a deadline, whatever it does.

The deadline counts everything: looking up the name, connecting, TLS, sending, the reply from its
first byte to its last, further attempts and the waits before them. A reply is read up to a limit,
which holds for what it inflates to as well.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from ppo_engine.errors import UserError
from ppo_engine.messages import counted
from ppo_engine.rewards.access import authorities, bearer_token, checked_url, from_netrc, is_here
from ppo_engine.settings.files import shown_url
from ppo_engine.settings.schema import RewardEndpointConfig

_FIRST_WAIT = 1.0  # seconds before the third attempt, doubled from there; the second comes at once
_PASSING = {408, 425, 429, *range(500, 600)}  # statuses of what may pass
_LONGEST_BODY = 16 * 2**20  # bytes; a score is at most some 30
_SHOWN_CHARACTERS = 200  # of a reply, in a message
_jitter = random.Random()  # not the generator that users' functions and a run's seed share

# What a server has not done where the deadline finds it, by the last event that was reported.
_STAGES = {
    "connection.connect_tcp.started": "accept a connection",
    "connection.start_tls.started": "agree on TLS",
    "http11.send_request_headers.started": "take the whole request",
    "http11.receive_response_headers.started": "answer",
    "http11.receive_response_headers.complete": "finish its answer",
}
_UNREACHED = ("accept a connection", "agree on TLS")
_UNREACHED_ADVICE = "Is the server running?"


@dataclass(frozen=True)
class _Failure:
    """Of an attempt: what the endpoint did, and what to do about it."""

    what: str
    advice: str
    passing: bool = True  # whether another attempt may fare better
    wait: float = 0.0  # seconds, that the server asks for


class _Attempt:
    """How far an attempt has come."""

    def __init__(self) -> None:
        self.missing = _STAGES["connection.connect_tcp.started"]
        self.connected_to: str | None = None  # the host, or a proxy

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        self.missing = _STAGES.get(event, self.missing)
        if event == "connection.connect_tcp.started":
            self.connected_to = info["host"]


class Endpoint:
    """Where a server is, the way to it, and what it is told of who asks."""

    def __init__(self, url: str, settings: RewardEndpointConfig) -> None:
        """Raises a UserError for a URL, a token or certificates that cannot be used."""
        self.shown = f"The reward endpoint {shown_url(url)}"
        self.timeout = settings.timeout
        self._url = checked_url(url)
        self._token = bearer_token(settings.token_env)
        self._tls = authorities()

    @property
    def host(self) -> str:
        """With the port, where the URL has one."""
        return self._url.netloc.decode("ascii")

    def client(self) -> httpx2.AsyncClient:
        """Connections for requests that follow each other; whoever takes it closes it."""
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            return httpx2.AsyncClient(
                headers=headers,
                auth=None if self._token else from_netrc(),
                verify=self._tls,
                timeout=None,  # the deadline bounds all of it
                # Proxies of the environment. One would look for this machine's server on itself.
                trust_env=not is_here(self._url.host),
            )
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise UserError(
                "The proxy that the environment sets (HTTP_PROXY, HTTPS_PROXY or ALL_PROXY) cannot "
                f"be used: {error} If {self._url.host} needs none, set NO_PROXY={self._url.host}."
            ) from error

    async def post(self, client: httpx2.AsyncClient, body: str) -> bytes:
        """The body of the reply, of status 200, to the JSON in `body`.

        What may pass is tried again. Raises a UserError where no such reply has come by the
        deadline, and for a status that another attempt would meet too. Redirects are not followed:
        they would make a GET of the POST, and take credentials elsewhere.
        """
        now = asyncio.get_running_loop().time
        began, failure, number, waits = now(), None, 0, _waits()
        while True:
            number, attempt = number + 1, _Attempt()
            try:
                async with asyncio.timeout_at(began + self.timeout):
                    response, reply = await self._ask(client, body, attempt)
            except TimeoutError as error:
                raise UserError(self._late(attempt, number, failure)) from error
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                failure = self._broken(error, attempt)
            else:
                if response.status_code == httpx2.codes.OK:
                    return reply
                failure = self._refused(response, reply)
            wait = max(next(waits), failure.wait)
            if not failure.passing or now() + wait >= began + self.timeout:
                raise UserError(self._given_up(failure, number, now() - began, wait))
            await asyncio.sleep(wait)

    async def _ask(
        self, client: httpx2.AsyncClient, body: str, attempt: _Attempt
    ) -> tuple[httpx2.Response, bytes]:
        """One attempt: a reply and its body, cut where it is no answer and too long."""
        tracing = {"trace": attempt.trace}
        reply = bytearray()
        async with (
            client.stream("POST", self._url, content=body, extensions=tracing) as response,
            aclosing(response.aiter_bytes()) as parts,  # inflated in pieces of 1 MiB at most
        ):
            async for part in parts:
                reply += part
                if len(reply) > _LONGEST_BODY:
                    break
        if len(reply) > _LONGEST_BODY and response.status_code == httpx2.codes.OK:
            raise UserError(
                f"{self.shown} answered with more than {_LONGEST_BODY // 2**20} MiB, and was not "
                "read to the end. Let it answer with the scores alone."
            )
        return response, bytes(reply)

    def _late(self, attempt: _Attempt, number: int, before: _Failure | None) -> str:
        """The message where the deadline came in attempt `number`."""
        history = f"; in the attempt before it {before.what}" if before else ""
        advice = (
            _UNREACHED_ADVICE
            if attempt.missing in _UNREACHED
            else "Raise reward.http.timeout, or send fewer responses at a time "
            "(reward.http.batch_size)."
        )
        return (
            f"{self.shown} did not {attempt.missing} within {self.timeout:g} s, in "
            f"{counted(number, 'attempt')}{history}. {advice}"
        )

    def _broken(self, error: httpx2.RequestError, attempt: _Attempt) -> _Failure:
        """An attempt that ended without a whole reply."""
        reason, text = _reason(error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return _Failure(
                f"has a certificate that cannot be trusted: {reason.verify_message}",
                "Name the file of the authority that signed it in SSL_CERT_FILE; certificates are "
                "always verified.",
                passing=False,
            )
        unreached = attempt.missing in _UNREACHED
        to_proxy = attempt.connected_to not in (None, self._url.raw_host.decode("ascii"))
        if isinstance(error, httpx2.ProxyError) or (unreached and to_proxy):
            return _Failure(
                "cannot be reached through the proxy that the environment sets (HTTP_PROXY, "
                f"HTTPS_PROXY or ALL_PROXY): {text}",
                f"If it needs none, set NO_PROXY={self._url.host}.",
            )
        if unreached:
            return _Failure(f"cannot be reached: {text}", _UNREACHED_ADVICE)
        if attempt.missing == "finish its answer":
            return _Failure(f"broke off its answer: {text}", "Check the server's log.")
        return _Failure(f"gave no valid HTTP answer: {text}", "Check the server's log.")

    def _refused(self, response: httpx2.Response, body: bytes) -> _Failure:
        """An attempt whose reply has another status than 200."""
        status = response.status_code
        passing = status in _PASSING
        if response.has_redirect_location:
            advice = f"Use the URL that it points to: {shown_url(response.headers['location'])}"
        elif status in (401, 403):
            advice = (
                "Name the environment variable that holds its token in reward.http.token_env, or "
                "put user and password into ~/.netrc, which only you may read."
            )
        elif passing:
            advice = "Check the server's log."
        else:
            advice = (
                "It must take POST requests with the JSON keys prompts, responses, finished and "
                "columns; check the URL and the server."
            )
        return _Failure(
            f"answered {status} {response.reason_phrase}{self.first_line(body)}",
            advice,
            passing,
            _asked_wait(response.headers.get("retry-after", "")),
        )

    def _given_up(self, failure: _Failure, attempts: int, seconds: float, wait: float) -> str:
        """The message where no attempt is to follow, or none may: the next `wait` is too long."""
        text = f"{self.shown} {failure.what}"
        if attempts > 1:
            text += f", in {counted(attempts, 'attempt')} within {seconds:.1f} s"
        if failure.passing and wait == failure.wait > 0:
            text += (
                f". It asks to wait {wait:.0f} s, longer than reward.http.timeout="
                f"{self.timeout:g} leaves: raise it"
            )
        return f"{text}. {failure.advice}"

    def first_line(self, body: bytes) -> str:
        """Of a reply, for a message; a server may repeat the token that it was sent."""
        lines = body[: 2**16].decode("utf-8", "replace").strip().splitlines()
        if not lines:
            return ", with an empty body"
        line = lines[0].replace(self._token, "…") if self._token else lines[0]
        return f": {line[:_SHOWN_CHARACTERS]!r}"


def _waits() -> Iterator[float]:
    """Seconds before each attempt but the first: none, then up to 1, 2, 4, …, each shortened at
    random by at most half, so that many who lost a server do not come back at once."""
    yield 0.0
    wait = _FIRST_WAIT
    while True:
        yield wait * _jitter.uniform(0.5, 1.0)
        wait *= 2


def _reason(error: BaseException) -> tuple[BaseException, str]:
    """What lies behind an error of the library's, in the system's words where it is the system's:
    asyncio's say which call failed, anyio's that all addresses did."""
    found, behind = error, error.__cause__ or error.__context__
    while behind is not None:
        if isinstance(behind, BaseExceptionGroup):  # an error for each address of the name
            behind = behind.exceptions[0]
        if isinstance(behind, OSError):
            found = behind
        behind = behind.__cause__ or behind.__context__
    if isinstance(found, OSError):
        known = found.errno in errno.errorcode and not isinstance(found, ssl.SSLError)
        text = os.strerror(found.errno or 0) if known else found.strerror or str(found)
    else:
        text = str(found)
    return found, text.rstrip(".") or type(found).__name__


def _asked_wait(retry_after: str) -> float:
    """Seconds that a `Retry-After` asks for, a whole number or a date (RFC 9110, section 10.2.3); 0
    for what is neither."""
    if re.fullmatch("[0-9]+", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0

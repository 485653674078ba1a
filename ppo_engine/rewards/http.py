"""An HTTP endpoint as a reward: one POST request with JSON for a batch of responses.

Request, every list as long as the batch:

    {"prompts": [...], "responses": [...], "finished": [...], "columns": {"name": [...], ...}}

Prompts are text, or lists of chat messages; `finished` says whether a response ended with EOS;
`columns` are the other columns of the data. Answer, with one finite number for each response:

    {"scores": [...]}          or {"rewards": [...]}, or the bare list
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.exceptions import ReadTimeoutError
from urllib3.util import Retry

from ppo_engine.errors import UserError
from ppo_engine.rewards.function import checked_scores
from ppo_engine.settings.files import shown_url
from ppo_engine.settings.schema import RewardEndpointConfig
from ppo_engine.text.prompt import Prompt

_ATTEMPTS = 6
_READ_ATTEMPTS = 3  # where the request got through: each may have cost the server its work
_BACKOFF = 0.5  # seconds; times 0, 2, 4, 8 and 16: the waits between attempts
_LONGEST_WAIT = 60  # seconds, where the server asks for a longer one (Retry-After)
_BODY_CHARACTERS = 200


class HTTPReward:
    """Scores from a server, with retries where it is busy, restarts, or cannot be reached."""

    def __init__(self, url: str, settings: RewardEndpointConfig) -> None:
        try:
            parts = urlsplit(url)
            valid = bool(parts.hostname) and parts.port != 0
        except ValueError:  # such as a port that is not a number
            valid = False
        if not valid:
            raise UserError(f"{shown_url(url)!r} is not a valid URL: write http://HOST:PORT/PATH.")
        self.url = url
        self.host = parts.netloc.rpartition("@")[2]
        self.settings = settings
        # A proxy would look for this machine's server on itself. `no_proxy` of a request goes
        # before the environment's.
        self._proxies = {"no_proxy": "*"} if _is_here(parts.hostname or "") else None
        self._shown = f"The reward endpoint {shown_url(url)}"
        retry = Retry(
            total=_ATTEMPTS - 1,
            read=_READ_ATTEMPTS - 1,
            backoff_factor=_BACKOFF,
            retry_after_max=_LONGEST_WAIT,
            status_forcelist=(429, *range(500, 600)),
            allowed_methods=("POST",),
            raise_on_status=False,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        finished: Sequence[bool],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Scores `[B]`, fp32, on the CPU; a UserError where the endpoint fails or misbehaves."""
        size = self.settings.batch_size or max(len(responses), 1)
        scores = []
        for start in range(0, len(responses), size):
            part = slice(start, start + size)
            request: dict[str, Any] = {
                "prompts": list(prompts[part]),
                "responses": list(responses[part]),
                "finished": list(finished[part]),
                "columns": {name: list(column[part]) for name, column in columns.items()},
            }
            answer = self._answer(request)
            if isinstance(answer, dict):
                answer = answer.get("scores", answer.get("rewards", answer))
            scores.append(checked_scores(answer, len(request["responses"]), self._shown))
        return torch.cat(scores) if scores else torch.zeros(0)

    def _answer(self, request: Mapping[str, Any]) -> Any:
        try:
            body = json.dumps(request, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self._shown} cannot be called: the prompts or their columns are not valid JSON "
                f"({error}). Give text, finite numbers, lists and dictionaries of them."
            ) from error
        response = self._post(body)
        if response.status_code != requests.codes.ok:
            raise UserError(
                f"{self._shown} answered {response.status_code} {response.reason}"
                f"{_first_line(response)}. {_advice(response)}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise UserError(
                f"{self._shown} answered 200, but not with JSON{_first_line(response)}. It must "
                'answer {"scores": [...]}.'
            ) from error

    def _post(self, body: str) -> requests.Response:
        try:
            return self._session.post(
                self.url,
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=self.settings.timeout,
                proxies=self._proxies,
                allow_redirects=False,  # they would turn the POST into a GET
            )
        except requests.RequestException as error:
            reason = getattr(error.args[0] if error.args else error, "reason", None)
            reason = reason or str(error).replace(self.url, shown_url(self.url))
            if isinstance(error, requests.Timeout) or isinstance(reason, ReadTimeoutError):
                raise UserError(
                    f"{self._shown} did not answer within {self.settings.timeout:g} s, nor on "
                    "retries. Raise reward.http.timeout, or send fewer responses at a time "
                    "(reward.http.batch_size)."
                ) from error
            if isinstance(error, requests.exceptions.ProxyError):
                raise UserError(
                    f"{self._shown} cannot be reached through the proxy that the environment sets "
                    f"(HTTP_PROXY, HTTPS_PROXY or ALL_PROXY): {reason}. If it needs none, set "
                    f"NO_PROXY={urlsplit(self.url).hostname}."
                ) from error
            raise UserError(
                f"{self._shown} cannot be reached: {reason}. Is the server running?"
            ) from error


def _is_here(host: str) -> bool:
    """Whether connections to `host` stay on this machine."""
    name = host.rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:  # a name
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _first_line(response: requests.Response) -> str:
    lines = response.text.strip().splitlines()
    return f": {lines[0][:_BODY_CHARACTERS]!r}" if lines else ", with an empty body"


def _advice(response: requests.Response) -> str:
    if response.is_redirect:
        return f"Use the URL that it points to: {shown_url(response.headers['location'])}"
    if response.status_code == requests.codes.too_many_requests or response.status_code >= 500:
        return f"That was the last of {_ATTEMPTS} attempts; check the server's log."
    return (
        "It must take POST requests with the JSON keys prompts, responses, finished and columns; "
        "check the URL and the server."
    )

"""The way to a server: a URL that can be asked, who asks, and whom to trust."""

from __future__ import annotations

import ipaddress
import netrc
import os
import re
import ssl

import httpx2

from ppo_engine.errors import UserError
from ppo_engine.settings.files import shown_url


def checked_url(url: str) -> httpx2.URL:
    """A UserError for what is no URL of HTTP, and for one with credentials in it."""
    try:
        found = httpx2.URL(url)
        valid = found.scheme in ("http", "https") and bool(found.host)
        valid &= found.port is None or 0 < found.port < 2**16
    except httpx2.InvalidURL:
        valid = False
    if not valid:
        raise UserError(f"{shown_url(url)!r} is not a valid URL: write http://HOST:PORT/PATH.")
    if found.userinfo:
        raise UserError(
            f"The URL {shown_url(url)} holds a user or a password, and config.yaml would keep "
            "them: put both into ~/.netrc, or a token into an environment variable, which "
            "reward.http.token_env names."
        )
    return found


def bearer_token(variable: str | None) -> str:
    """The token in that environment variable; empty where none is named."""
    if variable is None:
        return ""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"The environment has no token in {variable!r}, which reward.http.token_env names: "
            f"export {variable}=…"
        )
    if not re.fullmatch("[!-~]+", token):
        raise UserError(
            f"What the environment has in {variable!r}, which reward.http.token_env names, is no "
            "token: it may have no spaces, line ends or letters beyond ASCII."
        )
    return token


def from_netrc() -> httpx2.Auth | None:
    """User and password for each host that ~/.netrc, or the file in NETRC, has."""
    try:
        return httpx2.NetRCAuth(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):  # as elsewhere: one that cannot be read is none
        return None


def is_here(host: str) -> bool:
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


def authorities() -> ssl.SSLContext:
    """Those whose certificates are trusted: the system's, or SSL_CERT_FILE and SSL_CERT_DIR."""
    try:
        return httpx2.create_ssl_context()
    except OSError as error:
        raise UserError(
            "The certificates that the environment names in SSL_CERT_FILE or SSL_CERT_DIR cannot "
            f"be read: {error}."
        ) from error

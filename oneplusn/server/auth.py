"""Who asks: one bearer key in front of every route but health, and the place for what comes later.

The check runs before routing and before a body is read, on the very path that the router will
match. What is not listed as open is closed, unknown paths included. Without a key the server
listens on loopback only, and answers only requests that were sent to a loopback name: a web page
whose own name was made to point here is not one of them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from oneplusn.errors import ConfigError, HostNotAllowed, InvalidKey, OneplusnError
from oneplusn.server.errors import error_response
from oneplusn.server.settings import ENV_PREFIX, Settings

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/health/startup", "/ping"})
KEY_VARIABLE = f"{ENV_PREFIX}API_KEY"
DEFAULT_TENANT = "default"

Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request. Scopes and quotas belong here, once there is more than one key.

    Attributes:
        tenant: Whose adapters and cached prefixes the request may meet.
    """

    tenant: str


def principal(request: Request) -> Principal:
    """Return who makes a request; the one dependency through which routes learn it."""
    found: Principal = request.scope["state"]["principal"]
    return found


def read_key(settings: Settings, environment: Mapping[str, str]) -> str | None:
    """Read the API key from the file of the settings or from the environment.

    Raises:
        ConfigError: Both are given, the file cannot be read, the key is no key, or there is none
            and the server would be reachable from elsewhere.
    """
    given = environment.get(KEY_VARIABLE)
    if settings.api_key_file is not None:
        if given:
            msg = f"both --api-key-file and {KEY_VARIABLE} are set; keep one of them"
            raise ConfigError(msg, param="api_key_file")
        given = _read(settings.api_key_file)
    if given is None:
        _check_loopback(settings.host)
        return None
    if not given or not given.isascii() or not given.isprintable() or " " in given:
        source = settings.api_key_file or KEY_VARIABLE
        msg = f"the API key in {source} is empty or has spaces or other than ASCII characters"
        raise ConfigError(f"{msg}; make one with `openssl rand -hex 32`", param="api_key_file")
    return given


class Authentication:
    """Middleware: let through whoever has the key, and note who that is."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "websocket":  # there are none, and so none to protect
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            refusal = self._refusal(scope["headers"])
            if refusal is not None:
                await error_response(scope, refusal)(scope, receive, send)
                return
            scope.setdefault("state", {})["principal"] = Principal(DEFAULT_TENANT)
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> OneplusnError | None:
        if self._digest is None:
            return _wrong_host(headers)
        given = hashlib.sha256(_bearer(headers)).digest()
        if hmac.compare_digest(given, self._digest):
            return None
        msg = "the API key is missing or wrong; send it as `Authorization: Bearer <key>`"
        return InvalidKey(msg)


def _bearer(headers: Headers) -> bytes:
    """Return the token of the one authorization header; empty if there is none, or several."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return b""
    scheme, _, token = values[0].partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _wrong_host(headers: Headers) -> HostNotAllowed | None:
    """Refuse a request that a browser sent here under another name than this machine's own."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    # Only HTTP/1.0 has none, and no browser speaks it.
    name = _without_port(hosts[0]) if hosts else "localhost"
    if _is_loopback(name):
        return None
    msg = f"the host {name[:100]!r} is not this server's; without an API key it is only localhost"
    return HostNotAllowed(msg)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_loopback(host: str) -> None:
    """Refuse to be reachable from elsewhere without a key.

    Raises:
        ConfigError: The address is not a loopback one.
    """
    if not _is_loopback(host):
        msg = (
            f"--host {host} is reachable from other machines, and there is no API key; give one by "
            f"--api-key-file or {KEY_VARIABLE}, or keep --host 127.0.0.1"
        )
        raise ConfigError(msg, param="host")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read the API key from {path}: {error}"
        raise ConfigError(msg, param="api_key_file") from None

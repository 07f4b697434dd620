"""Where requests go: find the server, write requests as bytes, upload what is large."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import urlsplit

from oneplusn.loadtest.stream import LoadFailed

PORTS = {"http": 80, "https": 443}
CONNECT_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go.

    Attributes:
        name: The host as the URL names it.
        address: What it resolved to; names are not looked up while a load runs.
        path: What the URL puts before every route.
        tls: Connections are encrypted.
        key: Bearer key, or None.
    """

    name: str
    address: str
    port: int
    path: str = ""
    tls: bool = False
    key: str | None = field(default=None, repr=False)

    @property
    def context(self) -> ssl.SSLContext | None:
        """Whose certificates are believed; None without encryption."""
        return trusted() if self.tls else None

    @property
    def headers(self) -> dict[str, str]:
        """Those that every request carries."""
        key = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        host = f"[{self.name}]" if ":" in self.name else self.name
        return {"Host": f"{host}:{self.port}", **key}

    def post(self, path: str, body: bytes) -> bytes:
        """Return a request with a JSON body as bytes."""
        headers = {
            **self.headers,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }
        lines = [f"POST {self.path}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join([*lines, "\r\n"]).encode() + body

    def send(
        self,
        method: str,
        path: str,
        body: bytes | bytearray,
        headers: Mapping[str, str],
        *,
        limit_s: float,
    ) -> tuple[int, bytes]:
        """Send a body of any size from a thread; return the status and the answer.

        Raises:
            LoadFailed: The server cannot be reached, or is no HTTP server.
        """
        connection = (
            http.client.HTTPConnection(self.address, self.port, timeout=limit_s)
            if self.context is None
            else http.client.HTTPSConnection(
                self.name, self.port, timeout=limit_s, context=self.context
            )
        )
        try:
            connection.request(method, f"{self.path}{path}", body, {**self.headers, **headers})
            response = connection.getresponse()
            return response.status, response.read()
        except OSError as error:
            raise unreachable(error) from None
        except http.client.HTTPException as error:
            raise LoadFailed(f"the answer is no HTTP: {error!r}", group="no HTTP") from None
        finally:
            connection.close()


def reach(url: str, key: str | None = None) -> Server:
    """Find the server that a URL names, by connecting to it.

    Raises:
        LoadFailed: Nothing listens there, or it is no plain URL of http or https.
    """
    parts = urlsplit(url)
    if parts.scheme not in PORTS or parts.hostname is None or parts.query or parts.fragment:
        msg = f"{url!r} is no address of a server; give one like http://127.0.0.1:8000"
        raise LoadFailed(msg, group="address")
    if parts.username is not None:
        msg = "the address holds a name or password; only --api-key is sent"
        raise LoadFailed(msg, group="address")
    port = parts.port or PORTS[parts.scheme]
    try:
        with socket.create_connection((parts.hostname, port), CONNECT_LIMIT_S) as probe:
            address: str = probe.getpeername()[0]
    except OSError as error:
        msg = f"the server at {url} cannot be reached: {error}"
        raise LoadFailed(msg, group=_group(error)) from None
    return Server(
        parts.hostname, address, port, parts.path.rstrip("/"), parts.scheme == "https", key
    )


@cache
def trusted() -> ssl.SSLContext:
    """Return the context of this process, with the system's certificates."""
    return ssl.create_default_context()


def unreachable(error: OSError) -> LoadFailed:
    """Say that a connection failed."""
    return LoadFailed(f"the server cannot be reached: {error}", group=_group(error))


def _group(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return f"no connection ({name})"


def raise_open_files() -> None:
    """Allow as many connections at once as the system lets this process have."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

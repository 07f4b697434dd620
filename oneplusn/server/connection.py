"""One connection of a client: how long it may keep us waiting, and how many there may be.

uvicorn waits for ever: for the end of a request's head, and for a reader that has stopped reading.
Here both have a deadline. The third, for bodies, is `receiving.py`'s, where a body is counted.

uvicorn's own limit of concurrency answers nobody once it is reached, neither health checks nor who
was there before. Here those before it are served on; of the next `RESERVED`, only probes.
"""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import ClassVar

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from oneplusn.server.errors import error_body, kind_and_code
from oneplusn.server.logs import RequestRecord, log_request
from oneplusn.server.metrics import Metrics
from oneplusn.server.receiving import MIN_BYTES_PER_S
from oneplusn.server.settings import Settings
from oneplusn.server.web import EXCESS

RESERVED = 32
"""Connections beyond the limit that are read at all, so that probes get an answer."""


class Connection(H11Protocol):
    """uvicorn's connection with deadlines. Lives on the event loop.

    Attributes:
        head_seconds: What a request's head may take from its first byte, the first one of a
            connection from its beginning.
        write_seconds: After which a client that has read nothing meanwhile is cut.
        max_connections: After how many others it serves nothing but probes.
        metrics: Count what is refused here, which no middleware sees.
    """

    head_seconds: ClassVar[float]
    write_seconds: ClassVar[float]
    max_connections: ClassVar[int]
    metrics: ClassVar[Metrics]

    _num_bytes = 0
    _head_deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # uvicorn narrows it, too
        self, transport: asyncio.Transport
    ) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.metrics.set("http_connections", len(self.connections))
        excess = len(self.connections) - self.max_connections
        if excess > RESERVED:
            transport.abort()
            return
        if excess > 0:
            self.app_state = {**self.app_state, EXCESS: self.max_connections}
        # Whatever a client has not taken holds the next piece back, and starts its deadline.
        transport.set_write_buffer_limits(high=0)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take what has come, and look whether it was what is waited for."""
        before = self.cycle
        super().data_received(data)
        self._num_bytes += len(data)
        if self.cycle is not before:
            self._stop_awaiting_head()
        elif self._head_deadline is None and (before is None or before.response_complete):
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_awaiting_head()
        self._stop_awaiting_reader()
        super().connection_lost(exc)
        self.metrics.set("http_connections", len(self.connections))

    def pause_writing(self) -> None:
        """Begin to wait for the reader."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """Go on; all has been taken."""
        super().resume_writing()
        self._stop_awaiting_reader()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is answered."""
        self._refuse(400, msg)

    def _await_head(self) -> None:
        self._num_bytes = 0
        self._head_deadline = self.loop.call_later(self.head_seconds, self._give_up_on_head)

    def _stop_awaiting_head(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _give_up_on_head(self) -> None:
        self._head_deadline = None
        is_body = self.conn.their_state is h11.SEND_BODY
        if is_body and self._num_bytes >= MIN_BYTES_PER_S * self.head_seconds:
            # It was answered before its end, and who sends all of it first will read that then.
            self._await_head()
            return
        begun, _ = self.conn.trailing_data
        if begun:
            msg = f"the request's head was not complete after {self.head_seconds:g} s"
            self._refuse(408, f"{msg}, the limit; send it at once")
        else:
            # Who has asked nothing expects no answer; a browser may keep a connection in reserve.
            self.transport.close()

    def _await_reader(self) -> None:
        look = partial(self._look_at_reader, self.transport.get_write_buffer_size())
        self._write_deadline = self.loop.call_later(self.write_seconds, look)

    def _stop_awaiting_reader(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _look_at_reader(self, unsent: int) -> None:
        if self.transport.get_write_buffer_size() < unsent:
            self._await_reader()
        else:
            # Closing would wait for it. The request's task is told, as if the client had gone.
            self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never became a request, if nothing else is being answered, and hang up."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        kind, code = kind_and_code(status)
        record = RequestRecord(uuid.uuid4().hex, "none", status=status, code=code)
        headers = {
            "content-type": "application/json",
            "connection": "close",
            "x-request-id": record.request_id,
        }
        body = msgspec.json.encode(error_body(message, kind=kind, code=code))
        headers["content-length"] = str(len(body))
        response = h11.Response(status_code=status, headers=list(headers.items()))
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self.metrics.observe_request(record)
        log_request(record)


def connections(settings: Settings, metrics: Metrics) -> type[Connection]:
    """Return the connections of one server, as uvicorn takes them."""

    class Bounded(Connection):
        """With the deadlines of the settings."""

    Bounded.head_seconds = settings.header_timeout
    Bounded.write_seconds = settings.write_timeout
    Bounded.max_connections = settings.max_connections
    Bounded.metrics = metrics
    return Bounded

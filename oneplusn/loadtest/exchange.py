"""Send requests over TCP, and note when the bytes of the answers arrive.

The client shares the machine with what it measures, or at least must not be what is measured. So
there is no client library between the socket and the clock: the time is taken when the event loop
hands over what it read, and parsing waits until the loop has read every other socket that is ready.
"""

from __future__ import annotations

import asyncio
import time

from oneplusn.loadtest.stream import Arrival, LoadFailed, Reader
from oneplusn.loadtest.transport import Server, unreachable

MOST_IDLE_S = 2.0
"""How long a connection may lie unused; servers close theirs after some seconds."""


class Exchange:
    """One request, and the bytes that answer it.

    Attributes:
        sent: When the client began to send, or to connect if no connection was free, in seconds.
        connecting_s: How long connecting took; None if a connection was free.
        last: When something came last.
    """

    def __init__(self, request: bytes, reader: Reader) -> None:
        self.sent = time.perf_counter()
        self.connecting_s: float | None = None
        self.last = self.sent
        self._arrivals: list[Arrival] = []
        self._request = request
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()

    async def run(self, pool: Pool, *, limit_s: float) -> None:
        """Send the request and wait for the end of the answer.

        Raises:
            LoadFailed: No connection, no end within `limit_s`, or nothing that the reader takes.
        """
        try:
            async with asyncio.timeout(limit_s):
                await self._run(pool)
        except TimeoutError:
            msg = f"no end of the answer within {limit_s:g} s"
            raise LoadFailed(msg, group="timeout") from None
        except OSError as error:
            raise unreachable(error) from None

    async def _run(self, pool: Pool) -> None:
        connection = pool.free()
        if connection is not None:
            await self._use(connection, pool)
            if self.last > self.sent:
                return
            # The server closed it while the request was on its way: not an answer, so once more.
            self._over = self._loop.create_future()
        connection = await pool.connect()
        self.connecting_s = time.perf_counter() - self.sent
        await self._use(connection, pool)

    async def _use(self, connection: Connection, pool: Pool) -> None:
        try:
            connection.send(self._request, self)
            await self._over
        finally:
            if self._reader.reusable:
                pool.give_back(connection)
            else:
                connection.abort()

    def take(self, data: bytes) -> None:
        """Note what came when; it is parsed after the other sockets of this turn were read."""
        self.last = time.perf_counter()
        if not self._arrivals:
            self._loop.call_soon(self._read)
        self._arrivals.append((self.last, data))

    def lose(self) -> None:
        """Wake who waits; a connection that broke shows as an answer cut short."""
        if self.last > self.sent:
            self._arrivals.append((time.perf_counter(), b""))
            self._read()
        if not self._over.done():
            self._over.set_result(None)

    def _read(self) -> None:
        arrivals, self._arrivals = self._arrivals, []
        if self._over.done():
            return
        try:
            for when, data in arrivals:
                self._reader.feed(when, data)
        except LoadFailed as error:
            self._over.set_exception(error)
            return
        if self._reader.whole:
            self._over.set_result(None)


class Connection(asyncio.Protocol):
    """A connection, which serves one exchange at a time.

    Attributes:
        idle_since: When it served the last one, in seconds.
    """

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._transport: asyncio.WriteTransport | None = None
        self._exchange: Exchange | None = None

    def is_free(self, now: float) -> bool:
        """Whether the next request may take it."""
        assert self._transport is not None
        return not self._transport.is_closing() and now - self.idle_since < MOST_IDLE_S

    def send(self, request: bytes, exchange: Exchange) -> None:
        """Send a request; what comes from now on answers it."""
        assert self._transport is not None
        self._exchange = exchange
        self._transport.write(request)

    def release(self) -> None:
        """Belong to no exchange."""
        self._exchange = None
        self.idle_since = time.perf_counter()

    def abort(self) -> None:
        """Close it at once."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be ready to send."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand it on; what nobody asked for ends the connection."""
        if self._exchange is None:
            self.abort()
        else:
            self._exchange.take(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the exchange."""
        if self._exchange is not None:
            self._exchange.lose()


class Pool:
    """Connections to one server, kept for the next request.

    Attributes:
        opened: How many were opened.
    """

    def __init__(self, server: Server) -> None:
        self.opened = 0
        self._server = server
        self._free: list[Connection] = []

    def free(self) -> Connection | None:
        """Return the connection that was used last and is still good, if there is one."""
        now = time.perf_counter()
        while self._free:
            connection = self._free.pop()
            if connection.is_free(now):
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection:
        """Open a connection.

        Raises:
            OSError: The server does not take it.
        """
        server = self._server
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection,
            server.address,
            server.port,
            ssl=server.context,
            server_hostname=server.name if server.tls else None,
        )
        self.opened += 1
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        connection.release()
        self._free.append(connection)

    def close(self) -> None:
        """Close what is not in use."""
        while self._free:
            self._free.pop().abort()

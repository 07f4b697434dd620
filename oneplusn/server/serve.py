"""Run the application under uvicorn until it is told to stop, and stop in order.

The first SIGTERM drains: `/health/ready` and new requests get 503 at once, what is in flight has
`--shutdown-timeout` to finish. The second ends that with an error, the third without a word.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from oneplusn.errors import ConfigError
from oneplusn.server.app import create_app
from oneplusn.server.connection import RESERVED, connections
from oneplusn.server.host import allow_files
from oneplusn.server.launch import launcher
from oneplusn.server.logs import configure_logging
from oneplusn.server.settings import Settings
from oneplusn.server.state import Server
from oneplusn.server.web import MAX_HEADER_BYTES

_BACKLOG = 2048
_OWN_FILES = 256
"""Open files besides connections: libraries, sockets, pipes, the database, uploads."""
_FLUSH_S = 2
"""What answers get to reach their clients, once everything has ended."""
_log = logging.getLogger("oneplusn.server")


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; the port answers while the model is still loading.

    Raises:
        OneplusnError: The address is taken, or the model or an adapter cannot be served.
        KeyboardInterrupt: It was SIGINT.
    """
    failures: list[BaseException] = []

    def give_up(error: BaseException) -> None:
        failures.append(error)
        runner.should_exit = True

    app = create_app(settings, launcher(settings), on_failure=give_up)
    listener = _listen(settings)
    configure_logging(settings)
    _make_room(settings.max_connections)
    config = uvicorn_config(app)
    runner = Runner(config, app.state.server, drain_seconds=settings.shutdown_timeout)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    _log.info("listening on %s; loading the model", address)
    gc.freeze()  # a look through all that is loaded would hold up every stream for 60 ms
    with listener:
        runner.run(sockets=[listener])
    if failures:
        raise failures[0]
    if runner.interrupted:
        raise KeyboardInterrupt


def uvicorn_config(app: FastAPI, *, port: int = 0) -> uvicorn.Config:
    """Return how uvicorn serves the application; `port` is for who does not bring a socket."""
    server: Server = app.state.server
    return uvicorn.Config(
        app,
        port=port,
        http=connections(server.settings, server.metrics),
        # Both a head at its limit and one somewhat beyond it are read, and the latter answered.
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_S,
    )


class Runner(uvicorn.Server):
    """uvicorn with a way to stop that its clients can follow.

    Attributes:
        interrupted: Whether the first signal was SIGINT.
    """

    def __init__(self, config: uvicorn.Config, server: Server, *, drain_seconds: float) -> None:
        super().__init__(config)
        self.interrupted = False
        self._server = server
        self._drain_seconds = drain_seconds
        self._signals = 0
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Take signals on the event loop, where they can act at once."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals == 1:
            _log.info("draining on %s: up to %g s", number.name, self._drain_seconds)
            self.interrupted = number is signal.SIGINT
            self._server.drain()
            self._draining = asyncio.create_task(self._drain())
        elif self._signals == 2:
            _log.warning("ending what is in flight on a second %s", number.name)
            self._end()
        else:
            self.force_exit = True

    async def _drain(self) -> None:
        """Stop when no request is left, or when their time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._drain_seconds
        while (tasks := set(self.server_state.tasks)) and loop.time() < deadline:
            await asyncio.wait(tasks, timeout=deadline - loop.time())
        self._end()

    def _end(self) -> None:
        self._server.end_requests()
        self.should_exit = True


def _make_room(num_connections: int) -> None:
    """See to it that there may be so many connections, or warn."""
    wanted = num_connections + RESERVED + _OWN_FILES
    allowed = allow_files(wanted)
    if allowed < wanted:
        msg = "%d files may be open, %d connections need %d; raise ulimit -Hn, or lower %s"
        _log.warning(msg, allowed, num_connections, wanted, "--max-connections")


def _listen(settings: Settings) -> socket.socket:
    """Take the port before the model is loaded.

    Raises:
        ConfigError: It is taken, or the address is not this machine's.
    """
    where = (settings.host, settings.port)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server(where, family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        msg = f"cannot listen on {where[0]}:{where[1]}: {reason}; choose another --port or --host"
        raise ConfigError(msg, param="port") from None
    # Inherited by what is accepted. asyncio leaves it out for such a socket, and then every answer
    # on a connection that is kept open waits 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener

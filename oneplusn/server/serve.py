"""Run the application under uvicorn until it is told to stop."""

from __future__ import annotations

import logging
import signal
import socket
from types import FrameType

import uvicorn

from oneplusn.errors import ConfigError
from oneplusn.server.app import create_app
from oneplusn.server.launch import engine_factory
from oneplusn.server.logs import configure_logging
from oneplusn.server.settings import Settings

_BACKLOG = 2048
_log = logging.getLogger("oneplusn.server")


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; the port answers while the model is still loading.

    Raises:
        OneplusnError: The address is taken, or the model or an adapter cannot be served.
    """
    listener = _listen(settings)
    configure_logging(settings)
    failures: list[BaseException] = []

    def give_up(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, engine_factory(settings), on_failure=give_up)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
    server = uvicorn.Server(config)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    _log.info("listening on %s; loading the model", address)
    # uvicorn shuts down in order on SIGTERM and then raises it again, which ends up here.
    signal.signal(signal.SIGTERM, _exit_quietly)
    with listener:
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


def _listen(settings: Settings) -> socket.socket:
    """Take the port before the model is loaded.

    Raises:
        ConfigError: It is taken, or the address is not this machine's.
    """
    where = (settings.host, settings.port)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server(where, family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        msg = f"cannot listen on {where[0]}:{where[1]}: {reason}; choose another --port or --host"
        raise ConfigError(msg, param="port") from None


def _exit_quietly(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)

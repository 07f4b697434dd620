"""Put the routes, the handlers and one `Server` together into an ASGI application."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

from fastapi import FastAPI

from oneplusn import __version__
from oneplusn.server.auth import Authentication, read_key
from oneplusn.server.errors import add_error_handlers
from oneplusn.server.openapi import document
from oneplusn.server.routes import (
    adapters,
    chat,
    compat,
    completions,
    generate,
    health,
    info,
    metrics,
    models,
    tasks,
    tokenize,
)
from oneplusn.server.settings import Settings
from oneplusn.server.state import Server
from oneplusn.server.supervisor import Launch
from oneplusn.server.web import RequestContext
from oneplusn.server.workers import Workers

ROUTERS = (
    generate.router,
    chat.router,
    completions.router,
    models.router,
    tokenize.router,
    tasks.router,
    adapters.router,
    compat.router,
    info.router,
    health.router,
    metrics.router,
)


def create_app(
    settings: Settings,
    launch: Launch,
    *,
    workers: Workers | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """Build the application.

    It answers at once, with 503 until the model is loaded, so that health can be asked meanwhile.

    Args:
        settings: How to run.
        launch: Starts an engine.
        workers: Reads adapters; made here if none is given.
        on_failure: Told why the server cannot start.

    Raises:
        ConfigError: There is no key, and the server would be reachable from elsewhere.
    """
    key = read_key(settings, os.environ)
    server = Server(settings, launch, workers)

    async def start() -> None:
        try:
            await server.start()
        except Exception as error:
            # Whoever runs the application decides what it means; otherwise it shows at the end.
            if on_failure is None:
                raise
            on_failure(error)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(start())
        try:
            yield
        finally:
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            await server.stop()

    app = FastAPI(
        title="oneplusn",
        version=__version__,
        description="One base model, many tasks, one mixed batch.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.server = server
    app.openapi = partial(document, app, has_key=key is not None)  # type: ignore[method-assign]  # the documented way
    app.add_middleware(Authentication, key=key)
    app.add_middleware(RequestContext, metrics=server.metrics, body_seconds=settings.body_timeout)
    add_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app

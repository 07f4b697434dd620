"""Put the routes, the handlers and one `Server` together into an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

from oneplusn import __version__
from oneplusn.server.bridge import EngineFactory
from oneplusn.server.errors import add_error_handlers
from oneplusn.server.routes import (
    adapters,
    chat,
    completions,
    generate,
    health,
    metrics,
    models,
    tasks,
)
from oneplusn.server.settings import Settings
from oneplusn.server.state import Server
from oneplusn.server.web import RequestContext

ROUTERS = (
    generate.router,
    chat.router,
    completions.router,
    models.router,
    tasks.router,
    adapters.router,
    health.router,
    metrics.router,
)


def create_app(
    settings: Settings,
    factory: EngineFactory,
    *,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """Build the application.

    It answers at once, with 503 until the model is loaded, so that health can be asked meanwhile.

    Args:
        settings: How to run.
        factory: Loads the model; called on the engine's thread.
        on_failure: Told why the server cannot start.
    """
    server = Server(settings, factory)

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
    app.add_middleware(RequestContext, metrics=server.metrics)
    add_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app

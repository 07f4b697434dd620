"""Health, for whoever restarts the process or sends it traffic."""

from __future__ import annotations

from fastapi import APIRouter

from oneplusn.errors import EngineStopped
from oneplusn.server.routes.common import ServerDep, fails

router = APIRouter(tags=["health"])


@router.get("/health/live", responses=fails())
async def live(server: ServerDep) -> dict[str, str]:
    """200 while there is an engine or will be one; 503 once only restarting the server helps."""
    if not server.engine.alive:
        raise server.engine.failure or EngineStopped("the engine cannot be started")
    return {"status": "live"}


@router.get("/health/startup", responses=fails())
async def startup(server: ServerDep) -> dict[str, str]:
    """200 from the first time that requests are served."""
    if not server.is_started:
        raise server.obstacle or EngineStopped("the server is starting")
    return {"status": "started"}


@router.get("/health/ready", responses=fails())
@router.get("/health", responses=fails())
@router.get("/ping", responses=fails())
async def ready(server: ServerDep) -> dict[str, str]:
    """200 while requests are served; 503 before, after, and while the engine is restarted."""
    if server.obstacle is not None:
        raise server.obstacle
    return {"status": "ready"}

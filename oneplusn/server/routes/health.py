"""Health, for whoever restarts the process or sends it traffic."""

from __future__ import annotations

from fastapi import APIRouter

from oneplusn.errors import EngineStopped
from oneplusn.server.routes.common import ServerDep

router = APIRouter(tags=["health"])


@router.get("/health/live")
async def live(server: ServerDep) -> dict[str, str]:
    """200 while the process can do its work or is getting there; 503 once only a restart helps."""
    if server.engine.failure is not None:
        raise server.engine.failure
    return {"status": "live"}


@router.get("/health/ready")
@router.get("/health")
async def ready(server: ServerDep) -> dict[str, str]:
    """200 while requests are served, 503 before and after."""
    if not server.ready:
        raise server.engine.failure or EngineStopped("the server is starting")
    return {"status": "ready"}

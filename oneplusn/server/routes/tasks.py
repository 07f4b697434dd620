"""GET /v1/tasks: what can be asked for, and which adapter answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from oneplusn.server.routes.common import ServerDep

router = APIRouter(tags=["tasks"])


@router.get("/v1/tasks")
async def list_tasks(server: ServerDep) -> dict[str, Any]:
    """List every task with its cluster and the version that is active."""
    data = [
        {
            "name": task,
            "cluster": version.adapter,
            "adapter": version.adapter,
            "version": version.number,
            "method": version.method,
            "description": version.tasks[task],
        }
        for task, version in server.registry.tasks()
    ]
    return {"object": "list", "data": data}

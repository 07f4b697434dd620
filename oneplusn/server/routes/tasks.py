"""/v1/tasks: what can be asked for and what answers; blends saved under a name of their own."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

from oneplusn.adapters.registry import Blend, Version
from oneplusn.errors import InvalidRequest, UnknownTask
from oneplusn.server import schemas
from oneplusn.server.routes.common import READS_BODY, ServerDep, fails
from oneplusn.server.targets import sampling_defaults
from oneplusn.server.web import Json, JsonRoute

router = APIRouter(route_class=JsonRoute, tags=["tasks"])

TaskName = Annotated[str, Path(description="Name of a task or of a saved blend.")]


class SaveBlend(schemas.Body):
    """Body of `PUT /v1/tasks/{name}`."""

    blend: schemas.Blend


@router.get("/v1/tasks", responses=fails(), response_model=dict[str, Any])
async def list_tasks(server: ServerDep) -> Response:
    """List every task with its cluster and the version that is active, then the saved blends."""
    tasks = (_task(*task) for task in server.registry.tasks())
    return Json({"object": "list", "data": [*tasks, *map(_blend, server.registry.blends())]})


@router.get("/v1/tasks/{name}", responses=fails(404))
async def show_task(name: TaskName, server: ServerDep) -> dict[str, Any]:
    """Show one task or saved blend."""
    found = server.registry.find(name)
    if found is None:
        msg = f"no task is called {name[:100]!r}; GET /v1/tasks lists them"
        raise UnknownTask(msg, param="name")
    return _blend(found) if isinstance(found, Blend) else _task(name, found)


@router.put("/v1/tasks/{name}", responses={**READS_BODY, **fails(404, 409)})
async def save_blend(
    name: Annotated[str, Path(pattern=schemas.NAME_PATTERN)], body: SaveBlend, server: ServerDep
) -> dict[str, Any]:
    """Give a blend of tasks a name, under which it can be asked for like a task."""
    if name == server.settings.base_name:
        msg = f"{name!r} is the base model; give the blend another name"
        raise InvalidRequest(msg, code="name_reserved", param="name")
    try:
        server.inference.targets.resolve(body.blend)  # what could not be served is not saved
    except (UnknownTask, InvalidRequest) as error:
        error.param = "blend"
        raise
    return _blend(server.registry.save_blend(name, body.blend))


@router.delete("/v1/tasks/{name}", status_code=204, responses=fails(404, 409))
async def delete_blend(name: TaskName, server: ServerDep) -> Response:
    """Forget a saved blend; the tasks of an adapter go with the adapter alone."""
    server.registry.delete_blend(name)
    return Response(status_code=204)


def _task(task: str, version: Version) -> dict[str, Any]:
    return {
        "name": task,
        "cluster": version.adapter,
        "adapter": version.adapter,
        "version": version.number,
        "method": version.method,
        "description": version.tasks[task],
        "defaults": sampling_defaults(version, task),
        "blend": None,
    }


def _blend(blend: Blend) -> dict[str, Any]:
    nothing = dict.fromkeys(("cluster", "adapter", "version", "method"))
    weights = dict(blend.weights)
    return {"name": blend.name, **nothing, "description": "", "defaults": {}, "blend": weights}

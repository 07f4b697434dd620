"""GET /v1/models: the base, every task and every saved blend, as OpenAI's clients list them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from oneplusn.adapters.registry import Blend, Version
from oneplusn.errors import UnknownTask
from oneplusn.server.routes.common import ServerDep, fails
from oneplusn.server.state import Server
from oneplusn.server.web import Json

router = APIRouter(tags=["openai"])


@router.get("/v1/models", responses=fails(), response_model=dict[str, Any])
async def list_models(server: ServerDep) -> Response:
    """List everything that `model` may name: the base, then the tasks, then the blends."""
    tasks = (_task(server, *task) for task in server.registry.tasks())
    blends = (_blend(server, blend) for blend in server.registry.blends())
    return Json({"object": "list", "data": [_base(server), *tasks, *blends]})


@router.get("/v1/models/{model:path}", responses=fails(404))
async def show_model(model: str, server: ServerDep) -> dict[str, Any]:
    """Show the base, one task or one saved blend."""
    if model == server.settings.base_name:
        return _base(server)
    found = server.registry.find(model)
    if found is None:
        msg = f"no model or task is called {model[:100]!r}; GET /v1/models lists them"
        raise UnknownTask(msg)
    return _blend(server, found) if isinstance(found, Blend) else _task(server, model, found)


def _base(server: Server) -> dict[str, Any]:
    base = server.settings.base_name
    return _entry(server, base, created=server.began, root=base, parent=None)


def _task(server: Server, task: str, version: Version) -> dict[str, Any]:
    parent = server.settings.base_name
    entry = _entry(server, task, created=version.created, root=version.label, parent=parent)
    return {**entry, "adapter": version.label}


def _blend(server: Server, blend: Blend) -> dict[str, Any]:
    parent = server.settings.base_name
    return _entry(server, blend.name, created=server.began, root=blend.name, parent=parent)


def _entry(
    server: Server, name: str, *, created: float, root: str, parent: str | None
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "oneplusn",
        "root": root,
        "parent": parent,
        "max_model_len": server.inference.model.max_model_len,
    }

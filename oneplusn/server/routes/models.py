"""GET /v1/models: the base, every task and every saved blend, as OpenAI's clients list them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from oneplusn.adapters.registry import Version
from oneplusn.errors import UnknownTask
from oneplusn.server.routes.common import ServerDep, fails
from oneplusn.server.state import Server

router = APIRouter(tags=["openai"])


@router.get("/v1/models", responses=fails())
async def list_models(server: ServerDep) -> dict[str, Any]:
    """List everything that `model` may name."""
    return {"object": "list", "data": _models(server)}


@router.get("/v1/models/{model:path}", responses=fails(404))
async def show_model(model: str, server: ServerDep) -> dict[str, Any]:
    """Show the base, one task or one saved blend."""
    for entry in _models(server):
        if entry["id"] == model:
            return entry
    msg = f"no model or task is called {model[:100]!r}; GET /v1/models lists them"
    raise UnknownTask(msg)


def _models(server: Server) -> list[dict[str, Any]]:
    """Describe the base first, then the tasks, then the blends."""
    base = server.settings.base_name
    tasks = server.registry.tasks()
    return [
        _entry(server, base, created=server.began, root=base, parent=None),
        *(_task(server, task, version) for task, version in tasks),
        *(
            _entry(server, blend.name, created=server.began, root=blend.name, parent=base)
            for blend in server.registry.blends()
        ),
    ]


def _task(server: Server, task: str, version: Version) -> dict[str, Any]:
    parent = server.settings.base_name
    entry = _entry(server, task, created=version.created, root=version.label, parent=parent)
    return {**entry, "adapter": version.label}


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

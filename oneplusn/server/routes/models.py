"""GET /v1/models: the base and every task, as OpenAI's clients list them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from oneplusn.adapters.registry import Version
from oneplusn.errors import UnknownTask
from oneplusn.server.routes.common import ServerDep
from oneplusn.server.state import Server

router = APIRouter(tags=["openai"])


@router.get("/v1/models")
async def list_models(server: ServerDep) -> dict[str, Any]:
    """List everything that `model` may name."""
    return {"object": "list", "data": _models(server)}


@router.get("/v1/models/{model:path}")
async def show_model(model: str, server: ServerDep) -> dict[str, Any]:
    """Show the base or one task."""
    for entry in _models(server):
        if entry["id"] == model:
            return entry
    msg = f"no model or task is called {model[:100]!r}; GET /v1/models lists them"
    raise UnknownTask(msg)


def _models(server: Server) -> list[dict[str, Any]]:
    """Describe the base first, then the tasks."""
    tasks = server.registry.tasks()
    return [_base(server), *(_task(server, task, version) for task, version in tasks)]


def _base(server: Server) -> dict[str, Any]:
    name = server.settings.base_name
    return _entry(server, name, created=int(server.began), root=name, parent=None)


def _task(server: Server, task: str, version: Version) -> dict[str, Any]:
    parent = server.settings.base_name
    entry = _entry(server, task, created=int(version.created), root=version.label, parent=parent)
    return {**entry, "adapter": version.label}


def _entry(
    server: Server, name: str, *, created: int, root: str, parent: str | None
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "oneplusn",
        "root": root,
        "parent": parent,
        "max_model_len": server.inference.model.max_model_len,
    }

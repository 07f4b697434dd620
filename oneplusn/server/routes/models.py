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
    cards = _Cards(server)
    tasks = (cards.task(*task) for task in server.registry.tasks())
    blends = map(cards.blend, server.registry.blends())
    return Json({"object": "list", "data": [cards.base(), *tasks, *blends]})


@router.get("/v1/models/{model:path}", responses=fails(404))
async def show_model(model: str, server: ServerDep) -> dict[str, Any]:
    """Show the base, one task or one saved blend."""
    cards = _Cards(server)
    if model == server.settings.base_name:
        return cards.base()
    found = server.registry.find(model)
    if found is None:
        msg = f"no model or task is called {model[:100]!r}; GET /v1/models lists them"
        raise UnknownTask(msg)
    return cards.blend(found) if isinstance(found, Blend) else cards.task(model, found)


class _Cards:
    """Describes what `model` may name, thousands of them at a time."""

    def __init__(self, server: Server) -> None:
        self._base = server.settings.base_name
        self._began = server.began
        self._max_model_len = server.inference.model.max_model_len

    def base(self) -> dict[str, Any]:
        """Describe the base."""
        return self._card(self._base, created=self._began, root=self._base, parent=None)

    def task(self, task: str, version: Version) -> dict[str, Any]:
        """Describe a task."""
        label = version.label
        card = self._card(task, created=version.created, root=label, parent=self._base)
        return {**card, "adapter": label}

    def blend(self, blend: Blend) -> dict[str, Any]:
        """Describe a saved blend."""
        return self._card(blend.name, created=self._began, root=blend.name, parent=self._base)

    def _card(self, name: str, *, created: float, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(created),
            "owned_by": "oneplusn",
            "root": root,
            "parent": parent,
            "max_model_len": self._max_model_len,
        }

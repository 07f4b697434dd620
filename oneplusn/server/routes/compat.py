"""Other servers' routes for adapters and requests in flight, as aliases on this one's.

vLLM and SGLang name an adapter by a path; here it is one that was uploaded before, by its name, by
`name@version` or by its digest. Nothing is ever read from a path, and nothing fetched.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import Field

from oneplusn.adapters.registry import Adapter, Version
from oneplusn.errors import AdapterNotFound, InvalidRequest
from oneplusn.server.routes.common import READS_BODY, ServerDep, fails
from oneplusn.server.schemas import Body
from oneplusn.server.state import Server
from oneplusn.server.web import JsonRoute

router = APIRouter(route_class=JsonRoute, tags=["compatibility"])

MAX_ABORTS = 1024
_REFERENCE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]{0,63})(@(?P<number>[1-9][0-9]{0,8}))?|sha256:[0-9a-f]{64}",
    re.ASCII,
)
_CHANGES = {**READS_BODY, **fails(404, 409)}

Name = Annotated[str, Field(min_length=1, max_length=128)]


class LoadRequest(Body):
    """Body of vLLM's and SGLang's load routes."""

    lora_name: Name = Field(description="A task, or an adapter of one task.")
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="What to load: an adapter's name, name@version or digest; never a path."
    )
    load_inplace: bool = Field(False, description="Replace another version that is active.")
    pinned: bool = Field(False, description="Keep it resident.")


class UnloadRequest(Body):
    """Body of vLLM's and SGLang's unload routes."""

    lora_name: Name = Field(description="A task, or an adapter of one task.")


class AbortRequests(Body):
    """Body of vLLM's abort route."""

    request_ids: list[Name] = Field(max_length=MAX_ABORTS)


class AbortRequest(Body):
    """Body of SGLang's abort route."""

    rid: str = Field("", max_length=128)
    abort_all: bool = False


@router.post("/v1/load_lora_adapter", responses=_CHANGES, response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadRequest, server: ServerDep) -> str:
    """Activate a version of an adapter, as vLLM loads one."""
    await _load(server, body, replace=body.load_inplace)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", responses=_CHANGES, response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadRequest, server: ServerDep) -> str:
    """Deactivate an adapter, as vLLM unloads one: its name is unknown afterwards."""
    await _unload(server, body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


@router.post("/load_lora_adapter", responses=_CHANGES)
async def load_lora_adapter_as_sglang(body: LoadRequest, server: ServerDep) -> dict[str, Any]:
    """Activate a version of an adapter, as SGLang loads one."""
    await _load(server, body, replace=False)
    return _loaded(server)


@router.post("/unload_lora_adapter", responses=_CHANGES)
async def unload_lora_adapter_as_sglang(body: UnloadRequest, server: ServerDep) -> dict[str, Any]:
    """Deactivate an adapter, as SGLang unloads one."""
    await _unload(server, body.lora_name)
    return _loaded(server)


@router.post("/abort_requests", responses=READS_BODY)
async def abort_requests(body: AbortRequests, server: ServerDep) -> dict[str, list[str]]:
    """End requests by their ids (`x-request-id`); tell which of them were in flight."""
    in_flight = server.inference.in_flight
    return {"aborted": [id_ for id_ in dict.fromkeys(body.request_ids) if in_flight.abort(id_)]}


@router.post("/abort_request", responses=READS_BODY)
async def abort_request(body: AbortRequest, server: ServerDep) -> dict[str, list[str]]:
    """End one request by its id, or all, as SGLang does."""
    in_flight = server.inference.in_flight
    ids = in_flight.ids() if body.abort_all else [body.rid]
    return {"aborted": [id_ for id_ in ids if in_flight.abort(id_)]}


async def _load(server: Server, body: LoadRequest, *, replace: bool) -> None:
    version = _find(server, body.lora_path)
    _check_name(version, body.lora_name)
    active = server.registry.adapter(version.adapter).active
    if active is not None and active.number != version.number and not replace:
        msg = (
            f"{body.lora_name!r} is loaded already, as {active.label}; unload it first, or replace"
            " it by POST /v1/load_lora_adapter with load_inplace"
        )
        raise InvalidRequest(msg, code="adapter_exists", param="lora_name")
    if active is None or active.number != version.number:
        await server.swaps.activate(version.adapter, version.number)
    if body.pinned:
        await server.swaps.pin(version.adapter, True)


async def _unload(server: Server, name: str) -> None:
    """Deactivate the adapter behind a name.

    Raises:
        AdapterNotFound: Nothing active has this name.
        InvalidRequest: Other tasks would go with it.
    """
    active = _owner(server, name)
    if active is None:
        msg = f"no adapter or task called {name[:100]!r} is loaded; GET /v1/models lists them"
        raise AdapterNotFound(msg, param="lora_name")
    if len(active.tasks) > 1:
        msg = (
            f"{name!r} is of the adapter {active.adapter!r}, whose {len(active.tasks)} tasks come "
            f"and go together; use DELETE /v1/adapters/{active.adapter}"
        )
        raise InvalidRequest(msg, param="lora_name")
    await server.swaps.deactivate(active.adapter)


def _find(server: Server, reference: str) -> Version:
    """Return the version that a reference means: the active one, or else the newest, of a name.

    Raises:
        InvalidRequest: It is a path, an address or the like.
        AdapterNotFound: There is no such version.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        msg = (
            f"{reference[:100]!r} names no adapter of this server; upload it to /v1/adapters, then "
            "give its name, name@version or sha256 digest. Paths and addresses are never read"
        )
        raise InvalidRequest(msg, code="adapter_reference", param="lora_path")
    if match["name"] is None:
        return _by_digest(server, reference)
    if match["number"] is not None:
        return server.registry.version(match["name"], int(match["number"]))
    return _by_name(server, match["name"])


def _by_name(server: Server, name: str) -> Version:
    active = _owner(server, name)
    return active or server.registry.adapter(name).versions[-1]


def _by_digest(server: Server, digest: str) -> Version:
    every = [version for adapter in server.registry.adapters() for version in adapter.versions]
    for version in every:
        if version.digest == digest:
            return version
    raise AdapterNotFound(f"no adapter has the content {digest}", param="lora_path")


def _owner(server: Server, name: str) -> Version | None:
    """Return the active version of an adapter, or the one that has a task, of this name."""
    adapters: dict[str, Adapter] = {adapter.name: adapter for adapter in server.registry.adapters()}
    if name in adapters:
        return adapters[name].active
    return dict(server.registry.tasks()).get(name)


def _check_name(version: Version, name: str) -> None:
    """Refuse a name under which requests would not reach the version.

    Raises:
        InvalidRequest: It is none of its tasks, and not the adapter's own with one task.
    """
    if name in version.tasks or (name == version.adapter and len(version.tasks) == 1):
        return
    tasks = ", ".join(list(version.tasks)[:8])
    msg = f"{version.label} has {len(version.tasks)} tasks; name one of them: {tasks}"
    raise InvalidRequest(msg, param="lora_name")


def _loaded(server: Server) -> dict[str, Any]:
    tasks = {task: version.label for task, version in server.registry.tasks()}
    return {"success": True, "error_message": "", "loaded_adapters": tasks}

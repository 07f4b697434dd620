"""/v1/adapters: upload, look at, activate, roll back, pin, load, unload, download, delete."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException

from oneplusn.adapters.blobs import tar_bytes, tar_stream
from oneplusn.adapters.registry import Adapter, Version
from oneplusn.errors import AdapterNotFound, InvalidRequest, OneplusnError
from oneplusn.server import schemas
from oneplusn.server.errors import code_of
from oneplusn.server.routes.common import ADAPTER_HEADER, READS_BODY, ServerDep, fails
from oneplusn.server.state import Server
from oneplusn.server.uploads import Upload, receive_upload
from oneplusn.server.web import JsonRoute, record_of

router = APIRouter(tags=["adapters"])
reading = APIRouter(route_class=JsonRoute, tags=["adapters"])

MAX_PATIENCE_S = 600
_SWITCHES = {"activate": True, "dry_run": False, "strict": True, "assume_converted": False}
_FORM = {
    "type": "object",
    "required": ["name", "files"],
    "properties": {
        "name": {"type": "string", "description": "Name of the adapter."},
        "files": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": "The adapter's files, or one .tar, .tar.gz or .zip of them.",
        },
        "activate": {"type": "boolean", "description": "Serve it at once. Default: true."},
        "dry_run": {"type": "boolean", "description": "Report, and keep nothing."},
        "strict": {
            "type": "boolean",
            "description": "Refuse modules that the base does not have. Default: true.",
        },
        "assume_converted": {
            "type": "boolean",
            "description": "Take PiSSA, OLoRA or LoftQ as converted to plain LoRA.",
        },
    },
}

Name = Annotated[str, Path(description="Name of the adapter.")]
IfMatch = Annotated[
    str | None, Header(description="Generation that the adapter must have, as its ETag says.")
]


class _AdapterName(StringConvertor):
    """A name in a path: what follows a colon is what to do with the adapter."""

    regex = "[^/:]+"


register_url_convertor("adapter", _AdapterName())


class Activate(schemas.Body):
    """Body of `PUT /v1/adapters/{name}`."""

    version: int = Field(ge=1, description="Number of the version that its tasks shall mean.")


@router.post(
    "/v1/adapters",
    status_code=201,
    responses={
        200: {"description": "The same content was there, or a dry run."},
        **READS_BODY,
        **fails(400, 404, 409, 412, 413, 415, 422, 507),
    },
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    },
)
async def upload_adapter(
    request: Request, server: ServerDep, if_match: IfMatch = None
) -> JSONResponse:
    """Keep an adapter and activate it; 201 if its content is new under this name, else 200."""
    try:
        return await _publish(request, server, _generation(if_match))
    except (OneplusnError, HTTPException) as error:
        server.metrics.count("registry_uploads", result="refused", reason=code_of(error))
        raise


@router.get("/v1/adapters", responses=fails(400))
async def list_adapters(
    server: ServerDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(description="Name that the page before ended with.")] = "",
) -> dict[str, Any]:
    """List the adapters by name."""
    found = [adapter for adapter in server.registry.adapters() if adapter.name > after]
    page = found[:limit]
    return {
        "object": "list",
        "data": [_adapter(adapter, server) for adapter in page],
        "has_more": len(found) > len(page),
    }


@router.get("/v1/adapters/{name:adapter}", responses=fails(404))
async def show_adapter(name: Name, server: ServerDep) -> JSONResponse:
    """Show an adapter, with all its versions."""
    return _answer(server, name)


@router.get("/v1/adapters/{name:adapter}/versions", responses=fails(404))
async def list_versions(name: Name, server: ServerDep) -> dict[str, Any]:
    """List the versions of an adapter, oldest first."""
    versions = server.registry.versions(name)
    return {"object": "list", "data": [_version(version) for version in versions]}


@router.get(
    "/v1/adapters/{name:adapter}/download",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-tar": {}}}, **fails(400, 404)},
)
async def download_adapter(
    name: Name,
    server: ServerDep,
    version: Annotated[int | None, Query(ge=1, description="Default: the active one.")] = None,
) -> StreamingResponse:
    """Send a version's files as a .tar, which can be uploaded again."""
    found = _wanted(server.registry.adapter(name), version)
    await asyncio.to_thread(server.registry.verify, found.digest)
    headers = {
        ADAPTER_HEADER: found.label,
        "content-length": str(tar_bytes(found.files)),
        "content-disposition": f'attachment; filename="{found.adapter}-{found.number}.tar"',
    }
    body = tar_stream(server.registry.blob(found.digest))
    return StreamingResponse(body, media_type="application/x-tar", headers=headers)


@reading.put(
    "/v1/adapters/{name:adapter}",
    responses={**READS_BODY, **fails(400, 404, 409, 412, 413, 415)},
)
async def activate_version(
    name: Name, body: Activate, server: ServerDep, if_match: IfMatch = None
) -> JSONResponse:
    """Let the adapter's tasks mean one of its versions; requests in flight end on theirs."""
    await server.swaps.activate(name, body.version, if_match=_generation(if_match))
    return _answer(server, name)


@router.post("/v1/adapters/{name:adapter}:rollback", responses=fails(400, 404, 409, 412))
async def roll_back(name: Name, server: ServerDep, if_match: IfMatch = None) -> JSONResponse:
    """Let the adapter's tasks mean what they meant before the last change."""
    await server.swaps.rollback(name, if_match=_generation(if_match))
    return _answer(server, name)


@router.post("/v1/adapters/{name:adapter}:deactivate", responses=fails(404, 409))
async def deactivate(name: Name, server: ServerDep) -> JSONResponse:
    """Let the adapter's tasks mean nothing; its versions stay."""
    await server.swaps.deactivate(name)
    return _answer(server, name)


@router.post("/v1/adapters/{name:adapter}:pin", responses=fails(400, 404, 409))
async def pin_adapter(
    name: Name,
    server: ServerDep,
    pinned: Annotated[bool, Query(description="False lets it leave again.")] = True,
) -> JSONResponse:
    """Keep an adapter in memory and from being deleted, or no longer."""
    await server.swaps.pin(name, pinned)
    return _answer(server, name)


@router.post("/v1/adapters/{name:adapter}:load", responses=fails(404, 409, 422))
async def load_adapter(name: Name, server: ServerDep) -> JSONResponse:
    """Bring an adapter into memory before anybody asks for it."""
    num_bytes = await server.swaps.load(name)
    return _answer(server, name, bytes_resident=num_bytes)


@router.post(
    "/v1/adapters/{name:adapter}:unload",
    responses={
        202: {"description": "Requests still use it; it leaves after them."},
        **fails(400, 404, 409),
    },
)
async def unload_adapter(
    name: Name,
    server: ServerDep,
    force: Annotated[bool, Query(description="End the requests that use it.")] = False,
    timeout: Annotated[  # noqa: ASYNC109  (a field of the API; what waits is told it)
        float, Query(ge=0, le=MAX_PATIENCE_S, description="Seconds to wait for them.")
    ] = 30.0,
) -> JSONResponse:
    """Take an adapter out of memory; the next request for it brings it back."""
    freed = await server.swaps.unload(name, force=force, patience=timeout)
    if freed is None:
        return _answer(server, name, status=202)
    return _answer(server, name, bytes_freed=freed)


@router.delete("/v1/adapters/{name:adapter}", responses=fails(400, 404, 409, 412))
async def delete_adapter(
    name: Name,
    server: ServerDep,
    version: Annotated[int | None, Query(ge=1, description="Default: all of them.")] = None,
    if_match: IfMatch = None,
) -> dict[str, Any]:
    """Forget an adapter, or a version that is not active; requests in flight end on it."""
    gone = await server.swaps.delete(name, version, if_match=_generation(if_match))
    return {"object": "list", "deleted": [version.label for version in gone]}


router.include_router(reading)


async def _publish(request: Request, server: Server, if_match: int | None) -> JSONResponse:
    """Receive, check, load and activate; whatever fails, nothing stays behind."""
    swaps = server.swaps  # refuses before the body is received while the server is not ready
    server.workers.start()  # it may need a second or two, and so may the body
    with server.registry.incoming() as folder:
        upload = await receive_upload(request, folder, limit=server.settings.max_upload)
        name, switches = _name(upload), _switches(upload.fields)
        how = {key: switches[key] for key in ("strict", "assume_converted")}
        if switches["dry_run"]:
            prepared = await swaps.inspect(upload.files, name, **how)
            told = msgspec.to_builtins(prepared)
            del told["files"], told["layout"]
            return JSONResponse({"object": "adapter.report", **told})
        version, new, prepared = await swaps.publish(
            upload.files, name, activate=switches["activate"], if_match=if_match, **how
        )
    server.metrics.count("registry_uploads", result="kept", reason="")
    record_of(request).adapter = version.label
    headers = {ADAPTER_HEADER: version.label, **_etag(server.registry.adapter(name))}
    body = {**_version(version), "report": msgspec.to_builtins(prepared.report)}
    return JSONResponse(body, 201 if new else 200, headers=headers)


def _name(upload: Upload) -> str:
    """Return the name that the adapter shall have.

    Raises:
        InvalidRequest: The form has none, or no file.
    """
    name = upload.fields.get("name", "")
    if not name:
        raise InvalidRequest("the field name is missing", code="missing_field", param="name")
    if not upload.files:
        msg = "the form has no file; send the adapter's files, or one archive of them"
        raise InvalidRequest(msg, code="missing_field", param="files")
    return name


def _switches(fields: Mapping[str, str]) -> dict[str, bool]:
    """Read the form's fields that are true or false.

    Raises:
        InvalidRequest: One is neither, or there is no such field.
    """
    for field, value in fields.items():
        if field == "name":
            continue
        if field not in _SWITCHES:
            msg = f"there is no field {field[:100]!r}; the fields are name, files, "
            raise InvalidRequest(msg + ", ".join(_SWITCHES), param=field[:100])
        if value not in ("true", "false"):
            msg = f"{field} is {value[:100]!r}; it must be true or false"
            raise InvalidRequest(msg, param=field)
    return {
        field: fields.get(field, str(default).lower()) == "true"
        for field, default in _SWITCHES.items()
    }


def _generation(if_match: str | None) -> int | None:
    """Read the header If-Match.

    Raises:
        InvalidRequest: It is no generation.
    """
    if if_match is None or if_match == "*":
        return None
    found = re.fullmatch(r'"?(\d{1,18})"?', if_match)
    if found is None:
        msg = f"If-Match is {if_match[:100]!r}; send the ETag of the adapter, a number"
        raise InvalidRequest(msg, param="If-Match")
    return int(found[1])


def _wanted(adapter: Adapter, number: int | None) -> Version:
    """Return a version of an adapter, the active one by default.

    Raises:
        AdapterNotFound: There is none.
    """
    for version in adapter.versions:
        if version.active if number is None else version.number == number:
            return version
    what = "no active version" if number is None else f"no version {number}"
    msg = f"{adapter.name!r} has {what}; GET /v1/adapters/{adapter.name}/versions lists them"
    raise AdapterNotFound(msg)


def _answer(server: Server, name: str, *, status: int = 200, **more: int) -> JSONResponse:
    """Show an adapter as it is now."""
    adapter = server.registry.adapter(name)
    headers = _etag(adapter)
    if status == 202:
        headers["location"] = f"/v1/adapters/{name}"
    return JSONResponse({**_adapter(adapter, server), **more}, status, headers=headers)


def _etag(adapter: Adapter) -> dict[str, str]:
    return {"etag": f'"{adapter.generation}"'}


def _adapter(adapter: Adapter, server: Server) -> dict[str, Any]:
    """Describe an adapter by its active version, or the last one."""
    shown = adapter.active or adapter.versions[-1]
    return {
        **_version(shown),
        "pinned": adapter.pinned,
        "generation": adapter.generation,
        "resident": shown.digest in server.engine.resident,
        "versions": [_version(version) for version in adapter.versions],
    }


def _version(version: Version) -> dict[str, Any]:
    state = "active" if version.active else "inactive"
    return {
        "id": version.label,
        "object": "adapter",
        "name": version.adapter,
        "version": version.number,
        "digest": version.digest,
        "state": "corrupt" if version.corrupt else state,
        "method": version.method,
        "tasks": list(version.tasks),
        "rank": version.rank,
        "bytes": version.num_bytes,
        "base_model": version.base,
        "created": int(version.created),
    }

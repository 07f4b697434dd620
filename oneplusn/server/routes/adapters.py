"""/v1/adapters: upload an adapter and activate it; list what there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from oneplusn.adapters.registry import Version
from oneplusn.errors import InvalidRequest, OneplusnError
from oneplusn.server.offload import offload
from oneplusn.server.routes.common import ADAPTER_HEADER, ServerDep
from oneplusn.server.state import UPLOAD_PREFIX, Server
from oneplusn.server.uploads import Upload, receive_upload
from oneplusn.server.web import record_of

if TYPE_CHECKING:
    from oneplusn.adapters.bundle import Bundle

router = APIRouter(tags=["adapters"])

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
    },
}


@router.post(
    "/v1/adapters",
    status_code=201,
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    },
)
async def upload_adapter(request: Request, server: ServerDep) -> JSONResponse:
    """Keep an adapter and activate it; 201 if its content is new under this name, else 200."""
    try:
        version, new = await _publish(request, server)
    except OneplusnError as error:
        server.metrics.count("adapter_uploads", result=error.code)
        raise
    server.metrics.count("adapter_uploads", result="ok")
    record_of(request).adapter = version.label
    headers = {ADAPTER_HEADER: version.label}
    return JSONResponse(_describe(version), 201 if new else 200, headers=headers)


@router.get("/v1/adapters")
async def list_adapters(server: ServerDep) -> dict[str, Any]:
    """List the active version of every adapter."""
    return {"object": "list", "data": [_describe(version) for version in server.registry.active()]}


@router.get("/v1/adapters/{name}")
async def show_adapter(name: str, server: ServerDep) -> dict[str, Any]:
    """Show an adapter's active version, and all its versions."""
    versions = server.registry.versions(name)
    active = next(version for version in versions if version.active)
    return {**_describe(active), "versions": [_describe(version) for version in versions]}


async def _publish(request: Request, server: Server) -> tuple[Version, bool]:
    """Receive, read, load and activate; whatever fails, nothing stays behind."""
    _ = server.inference  # refuses before the body is received while the server is not ready
    limit = server.settings.max_upload
    with TemporaryDirectory(prefix=UPLOAD_PREFIX, dir=server.data) as folder:
        upload = await receive_upload(request, Path(folder), limit=limit)
        name = _name(upload)
        bundle = await offload(_read, upload.files, name, limit)
    return await server.publish(bundle, name)


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


def _read(files: Mapping[str, Path], name: str, limit: int) -> Bundle:
    # Imported here because it needs torch, which the modules of the API do not load.
    from oneplusn.adapters.files import read_upload

    return read_upload(files, name=name, max_bytes=limit)


def _describe(version: Version) -> dict[str, Any]:
    return {
        "id": version.label,
        "object": "adapter",
        "name": version.adapter,
        "version": version.number,
        "digest": version.digest,
        "state": "active" if version.active else "inactive",
        "method": version.method,
        "tasks": list(version.tasks),
        "rank": version.rank,
        "bytes": version.num_bytes,
        "base_model": version.base,
        "created": int(version.created),
    }

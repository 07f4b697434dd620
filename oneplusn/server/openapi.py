"""The interface as an OpenAPI document: what the framework writes, made true.

The framework promises 422 for every body, where this server answers 400, and knows nothing of the
errors that every route has, nor of the key. Both are said here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from oneplusn.server.auth import OPEN_PATHS

_TEXT = {"type": "string"}
_NULLABLE = {"anyOf": [_TEXT, {"type": "null"}]}
_ERROR_OBJECT = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {"message": _TEXT, "type": _TEXT, "param": _NULLABLE, "code": _NULLABLE},
}
_ERROR_BODY = {"type": "object", "required": ["error"], "properties": {"error": _ERROR_OBJECT}}
ERROR_RESPONSE: dict[str, Any] = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
}

EVENT_RESPONSE: dict[str, Any] = {
    "content": {
        "text/event-stream": {
            "schema": {"type": "object", "required": ["data"], "properties": {"data": _TEXT}}
        }
    }
}

_KEY = "key"
_FRAMEWORKS_OWN = ("HTTPValidationError", "ValidationError")
_ANYWHERE = {
    "431": "Request Header Fields Too Large",
    "500": "Internal Server Error",
    "503": "Service Unavailable",
}
_WITH_KEY = {"401": "Unauthorized"}
_WITHOUT_KEY = {"421": "Misdirected Request"}


def document(app: FastAPI, *, has_key: bool) -> dict[str, Any]:
    """Write the document of an application, once; `has_key` says whether it demands one."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        for path, operations in made["paths"].items():
            guard = {} if path in OPEN_PATHS else _WITH_KEY if has_key else _WITHOUT_KEY
            for operation in operations.values():
                _complete(operation, guard)
        schemas = made["components"]["schemas"]
        for name in _FRAMEWORKS_OWN:
            schemas.pop(name, None)
        schemas["Error"] = _ERROR_BODY
        if has_key:
            made["components"]["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = made
    return app.openapi_schema


def _complete(operation: dict[str, Any], guard: Mapping[str, str]) -> None:
    """Take out the framework's own 422, and add what may go wrong on any route."""
    responses = operation["responses"]
    if _FRAMEWORKS_OWN[0] in str(responses.get("422")):
        del responses["422"]
    for status, description in {**_ANYWHERE, **guard}.items():
        responses.setdefault(status, {"description": description, **ERROR_RESPONSE})
    if guard is _WITH_KEY:
        operation["security"] = [{_KEY: []}]

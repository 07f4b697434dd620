"""Turn every failure into OpenAI's error object: `{"error": {message, type, param, code}}`.

All four keys are always there. Our own exceptions carry their answer (`oneplusn/errors.py`);
what the framework raises is mapped by status. No answer holds a traceback, a path or an address.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPMethod
from reprlib import Repr
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from oneplusn.errors import InvalidRequest, OneplusnError

RETRY_AFTER_SECONDS = "1"
_BY_STATUS = {
    400: ("invalid_request_error", "invalid_value"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: ("invalid_request_error", "payload_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    431: ("invalid_request_error", "headers_too_large"),
    503: ("overloaded_error", "too_many_connections"),
}
# After these, what the client still sends of the request is not worth reading.
_CLOSING = frozenset({408, 413, 431, 503})
_NAME_OR_INDEX = re.compile(r"\w+\Z", re.ASCII)
# Writes values out, of large ones the beginning.
_shown = Repr()
_shown.maxstring = _shown.maxother = 60
_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "dict", "list", "none", "nullable"})


def kind_and_code(status: int) -> tuple[str, str]:
    """Return the `type` and `code` of an error of the framework, which only has a status."""
    return _BY_STATUS.get(status, ("invalid_request_error", "http_error"))


def code_of(error: OneplusnError | HTTPException) -> str:
    """Return the code that an error is answered with."""
    return error.code if isinstance(error, OneplusnError) else kind_and_code(error.status_code)[1]


def error_body(
    message: str, *, kind: str, code: str, param: str | None = None
) -> dict[str, dict[str, str | None]]:
    """Build OpenAI's error object; `kind` is its `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: OneplusnError) -> dict[str, dict[str, str | None]]:
    """Build the error object of one of our own exceptions."""
    return error_body(error.message, kind=error.type, code=error.code, param=error.param)


def error_response(scope: Scope, error: OneplusnError) -> JSONResponse:
    """Answer with one of our own exceptions, and note it for the log."""
    scope["state"]["record"].code = error.code
    return JSONResponse(body_of(error), error.status_code, headers=_headers(error))


def http_error_response(scope: Scope, error: HTTPException) -> JSONResponse:
    """Answer with an exception of the framework, or one raised in its name."""
    kind, code = kind_and_code(error.status_code)
    scope["state"]["record"].code = code
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{scope['method']} {scope['path'][:100]}: {message}; see /docs for the routes"
    headers = dict(error.headers or {})
    if error.status_code in _CLOSING:
        headers["connection"] = "close"
    return JSONResponse(
        error_body(message, kind=kind, code=code), error.status_code, headers=headers
    )


def internal_error_body() -> dict[str, dict[str, str | None]]:
    """Build the error object for a fault of ours. It says nothing: the log does."""
    message = "The server failed to answer; its log has the reason under this request id."
    return error_body(message, kind="server_error", code="internal_error")


def internal_error() -> JSONResponse:
    """Answer for a fault of ours."""
    return JSONResponse(internal_error_body(), 500, headers={"x-should-retry": "false"})


def add_error_handlers(app: FastAPI) -> None:
    """Register the handlers on `app`."""
    app.add_exception_handler(OneplusnError, _on_oneplusn_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_oneplusn_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OneplusnError)
    return error_response(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong = explain(error.errors())
    request.scope["state"]["record"].code = wrong.code
    return JSONResponse(body_of(wrong), wrong.status_code)


def explain(problems: Sequence[Any]) -> InvalidRequest:
    """Say of what pydantic reports which field is wrong, what it holds, and what it should be.

    Args:
        problems: Not empty; the first part of every `loc` is no field, and is left out.
    """
    problem = _most_specific(problems)
    code = "missing_field" if problem["type"] == "missing" else None
    message, param = _describe(problem, problems), _param(problem["loc"])
    return InvalidRequest(message, code=code, param=param or None)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        error.headers = {"allow": ", ".join(_methods(request))}
    return http_error_response(request.scope, error)


def _methods(request: Request) -> list[str]:
    """List the methods that a path takes; the router knows those of one route at a time."""
    routes = request.app.routes
    scopes = {method.value: {**request.scope, "method": method.value} for method in HTTPMethod}
    return [
        method
        for method, scope in sorted(scopes.items())
        if any(route.matches(scope)[0] is Match.FULL for route in routes)
    ]


def _headers(error: OneplusnError) -> dict[str, str]:
    """Tell clients whether to try again; theirs retry 409 and every 5xx unless told not to."""
    if error.code == "draining":  # the next request had better reach another server
        return {"retry-after": RETRY_AFTER_SECONDS, "connection": "close"}
    if error.retryable:
        return {"retry-after": RETRY_AFTER_SECONDS}
    if error.status_code == 401:
        return {"www-authenticate": "Bearer"}
    if error.status_code == 409 or error.status_code >= 500:
        return {"x-should-retry": "false"}
    return {}


def _param(location: Sequence[Any]) -> str:
    """Name the field of a validation error, as `parameters.top_p` or `stop.3`.

    Branches of a union are part of the location that pydantic reports; they are left out.
    """
    parts = [str(part) for part in location[1:]]
    return ".".join(
        part for part in parts if part not in _TYPE_NAMES and _NAME_OR_INDEX.match(part)
    )


def _most_specific(problems: Sequence[Any]) -> Any:  # noqa: ANN401  (pydantic's own)
    """Pick the problem to tell of: the deepest one of the first field that is wrong.

    A union reports every branch that did not fit; the one that fits best is wrong deepest inside,
    or has the right type.
    """
    field = problems[0]["loc"][:2]
    of_field = [problem for problem in problems if problem["loc"][:2] == field]
    return max(of_field, key=lambda p: (len(p["loc"]), not p["type"].endswith("_type")))


def _describe(problem: Any, problems: Sequence[Any]) -> str:  # noqa: ANN401  (pydantic's own)
    """Say which field is wrong, what it holds, and what it should be."""
    param = _param(problem["loc"]) or "the body"
    reason = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{param} is missing"
    given = _shown.repr(problem["input"])
    given = given if len(given) <= 60 else f"{given[:57]}..."
    field = problem["loc"][:2]
    more = {_param(other["loc"]) for other in problems if other["loc"][:2] != field}
    also = f" (also wrong: {', '.join(sorted(more))})" if more else ""
    return f"{param} is {given}: {reason}{also}"

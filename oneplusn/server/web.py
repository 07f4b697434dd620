"""What the routes share: strict JSON in, event streams out, an ear for clients that go away.

Around them all, `RequestContext` gives every answer its id, its line of log and its counts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oneplusn.errors import OneplusnError, RequestCancelled
from oneplusn.server.auth import OPEN_PATHS
from oneplusn.server.errors import (
    RETRY_AFTER_SECONDS,
    body_of,
    http_error_response,
    internal_error,
    internal_error_body,
)
from oneplusn.server.logs import (
    RequestRecord,
    log_request,
    milliseconds_since,
    read_trace_id,
)
from oneplusn.server.metrics import Metrics
from oneplusn.server.receiving import TimedReceive

T = TypeVar("T")
Events = AsyncGenerator[Iterator[dict[str, Any]], None]
"""Events as they come: those of one step together, perhaps none."""

EXCESS = "excess_over"
"""In the state of requests on a connection beyond the limit: the limit."""
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 << 10
PROBE_PATHS = OPEN_PATHS | {"/metrics"}

# Larger bodies are parsed on a thread, so that other requests do not stall meanwhile.
_INLINE_BYTES = 64 << 10

_REQUEST_ID = re.compile(r"[\w-]{1,128}\Z", re.ASCII)
_log = logging.getLogger("oneplusn.server")


class JsonRequest(Request):
    """A request whose body is counted while it arrives, and is JSON by the letter.

    NaN, Infinity, numbers beyond a double, lone surrogates, a key that is given twice and endless
    nesting are refused here, so that no library behind ever sees them.
    """

    async def body(self) -> bytes:
        """Read the body.

        Raises:
            HTTPException: 413 as soon as the limit is passed, 415 for another media type or a
                compressed body.
        """
        if not hasattr(self, "_body"):
            self._check_form()
            limit = self.app.state.server.settings.max_body
            declared = self.headers.get("content-length", "")
            if declared.isdecimal() and int(declared) > limit:
                raise _too_large(limit)
            received = bytearray()
            async for chunk in self.stream():
                received += chunk
                if len(received) > limit:
                    raise _too_large(limit)
            self._body = bytes(received)
        return self._body

    async def json(self) -> Any:  # noqa: ANN401  (any JSON value)
        """Parse the body.

        Raises:
            HTTPException: 400 with the reason.
        """
        body = await self.body()
        try:
            if len(body) <= _INLINE_BYTES:
                return _parse(body)
            return await asyncio.to_thread(_parse, body)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None

    def _check_form(self) -> None:
        media_type = self.headers.get("content-type", "none").partition(";")[0].strip().lower()
        if media_type != "application/json":
            detail = f"content-type is {media_type[:60]!r}; send application/json"
            raise HTTPException(415, detail)
        coding = self.headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            detail = f"content-encoding is {coding[:60]!r}; send the body as it is"
            raise HTTPException(415, detail)


class JsonRoute(APIRoute):
    """A route that reads its body through `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler that the framework makes."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return strict


class Json(JSONResponse):
    """A JSON answer, written several times as fast as the framework writes one.

    Returned by a route, it is sent as it is: the framework would copy all of it first.
    """

    def render(self, content: Any) -> bytes:  # noqa: ANN401  (any JSON value)
        """Write the body."""
        return msgspec.json.encode(content)


class EventStream(StreamingResponse):
    """Server-sent events, one JSON object each; what comes together is one write.

    A failure on the way becomes a last event with OpenAI's error object; then the stream ends
    without `done`. When the client goes away, the source is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        source: Events,
        *,
        done: bool,
        headers: dict[str, str],
    ) -> None:
        """Take the first events and the source of the others; `done` adds OpenAI's `[DONE]`."""
        self._first = first
        self._source = source
        self._done = done
        self._complete = False
        still = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events(), headers={**still, **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and note whether the client stayed to the end."""
        self._record: RequestRecord = scope["state"]["record"]
        self._record.disconnect = True
        await super().__call__(scope, receive, send)
        self._record.disconnect = not self._complete

    async def stream_response(self, send: Send) -> None:
        """Send the events, and close the source however that ends."""
        async with aclosing(self._source):
            await super().stream_response(send)
        self._complete = True

    async def _events(self) -> AsyncIterator[bytes]:
        yield self._first
        try:
            async for events in self._source:
                if data := _encode(events):
                    yield data
        except OneplusnError as error:
            yield _event(body_of(error))
        except Exception:
            # The last resort within a stream: what began as a 200 must not end without a word.
            _log_fault(self._record)
            yield _event(internal_error_body())
        else:
            if self._done:
                yield b"data: [DONE]\n\n"


async def stream_events(
    request: Request,
    source: Events,
    *,
    done: bool,
    headers: Callable[[], dict[str, str]],
) -> EventStream:
    """Answer with events once there is a first one; a failure before it gets its own status.

    Args:
        request: Its body has been read.
        source: The events.
        done: End with OpenAI's `[DONE]`.
        headers: Asked once there is a first event.

    Raises:
        OneplusnError: The source failed before its first event.
    """
    first = await until_disconnect(request, _first(source))
    return EventStream(first, source, done=done, headers=headers())


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for `work`, but cancel it when the client goes away.

    Raises:
        RequestCancelled: It went away; nobody reads the answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            record_of(request).disconnect = True
            raise RequestCancelled("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def record_of(request: Request) -> RequestRecord:
    """Return what the log will say about a request."""
    record: RequestRecord = request.scope["state"]["record"]
    return record


def adopt_request_id(request: Request, given: str | None) -> str:
    """Return a request's id: that of its header, else that of its body, else the one made here."""
    record = record_of(request)
    if given is not None and _given_id(request.scope) is None:
        record.request_id = given
    return record.request_id


class RequestContext:
    """Outermost middleware: request id, log line, request metrics, and the last resort for faults.

    The client's `x-request-id` is kept if it is harmless, else a new one is made; the answer
    carries it. Bodies are read with a deadline, by whatever reads them.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, body_seconds: float) -> None:
        self._app = app
        self._metrics = metrics
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace_id = read_trace_id(_header(scope, b"traceparent"))
        record = RequestRecord(_given_id(scope) or uuid.uuid4().hex, scope["method"], trace_id)
        scope.setdefault("state", {})["record"] = record
        start = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            problem = _header_problem(scope) or _crowding(scope)
            app = self._app if problem is None else http_error_response(scope, problem)
            timed = TimedReceive(receive, self._body_seconds, lambda: record.status is not None)
            await app(scope, timed, send_with_id)
        except ClientDisconnect:
            record.disconnect = True
        except Exception:
            # The last resort: the client gets an answer in OpenAI's shape, the log the reason.
            _log_fault(record)
            if record.status is None:
                await internal_error()(scope, receive, send_with_id)
        finally:
            record.e2e_ms = milliseconds_since(start)
            self._finish(scope, record)

    def _finish(self, scope: Scope, record: RequestRecord) -> None:
        route = scope.get("route")
        record.route = getattr(route, "path_format", record.route)
        self._metrics.observe_request(record)
        log_request(record)


def _log_fault(record: RequestRecord) -> None:
    """Log the exception that is being handled, under the request's id."""
    _log.exception("request %s failed", record.request_id)
    record.code = "internal_error"


def _given_id(scope: Scope) -> str | None:
    """Read the client's `x-request-id`, if it is one that a log and an answer can carry."""
    given = _header(scope, b"x-request-id")
    return given if _REQUEST_ID.match(given) else None


def _header(scope: Scope, name: bytes) -> str:
    """Return the last of the headers of a name; empty if there is none."""
    value: bytes = dict(scope["headers"]).get(name, b"")
    return value.decode("latin-1")


def _header_problem(scope: Scope) -> HTTPException | None:
    """Say what is wrong with the headers: too many, too large, or two lengths for one body."""
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        limits = f"{MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes"
        return HTTPException(431, f"{len(headers)} headers of {size} bytes; {limits} are read")
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        return HTTPException(400, "the body has both a content-length and a transfer-encoding")
    return None


def _crowding(scope: Scope) -> HTTPException | None:
    """Refuse what came on one connection too many, unless it is what tells of such troubles."""
    limit = scope["state"].get(EXCESS)
    if limit is None or scope["path"] in PROBE_PATHS:
        return None
    msg = f"{limit} connections are open, the limit; come back later, or raise --max-connections"
    return HTTPException(503, msg, {"retry-after": RETRY_AFTER_SECONDS})


async def _first(source: Events) -> bytes:
    async with AsyncExitStack() as stack:
        stack.push_async_callback(source.aclose)
        async for events in source:
            if data := _encode(events):
                stack.pop_all()
                return data
    raise AssertionError("an answer without an event")


async def _disconnected(request: Request) -> None:
    """Return when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body has more than {limit} bytes, the limit; send less at once")


def _parse(body: bytes) -> Any:  # noqa: ANN401  (any JSON value)
    """Parse JSON by the letter.

    Raises:
        MsgspecError, RecursionError, ValueError: It is none.
    """
    value = msgspec.json.decode(body)
    json.loads(body, object_pairs_hook=_refuse_duplicates)
    return value


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    """Keep nothing of an object, once its keys are known to differ.

    Raises:
        ValueError: A key is there twice; two readers of the body would see two requests.
    """
    if len(dict(pairs)) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        msg = f"the key {twice[:60]!r} is given twice"
        raise ValueError(msg)


def _encode(events: Iterator[dict[str, Any]]) -> bytes:
    return b"".join(map(_event, events))


def _event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"

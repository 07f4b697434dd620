"""Logs: one line per request with who, what and how long, and never a prompt."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from oneplusn.server.settings import Settings

_PLAIN = re.compile(r"[\w.:/@+\-]+\Z", re.ASCII)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-|\Z)", re.ASCII)
_NO_TRACE = "0" * 32
# Asked every few seconds by machines; their lines would drown the others.
PROBES = ("/health", "/ping", "/metrics")
_access = logging.getLogger("oneplusn.access")


@dataclass(slots=True)
class RequestRecord:
    """What the log says about one request; filled in while it is served.

    Attributes:
        trace_id: The trace that the client's `traceparent` names.
        queue_ms: Milliseconds until its first step.
        ttft_ms: Milliseconds until its first token.
        e2e_ms: Milliseconds until the answer was sent.
        disconnect: The client went away before the end.
    """

    request_id: str
    method: str
    trace_id: str | None = None
    route: str = "unmatched"
    task: str | None = None
    adapter: str | None = None
    status: int | None = None
    code: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    disconnect: bool = False


def read_trace_id(traceparent: str) -> str | None:
    """Return the id of the trace that a W3C `traceparent` header names; None if it is malformed."""
    match = _TRACEPARENT.match(traceparent)
    return None if match is None or match[1] == _NO_TRACE else match[1]


def log_request(record: RequestRecord) -> None:
    """Write the line of one request; fields that do not apply are left out."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    known = {k: value for k, value in values.items() if value is not None and value is not False}
    level = logging.DEBUG if record.route.startswith(PROBES) else logging.INFO
    _access.log(level, "request", extra={"fields": known})


def configure_logging(settings: Settings) -> None:
    """Send every log of the process to stderr, in the format and from the level asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if settings.log_format == "json" else _TextFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    # What these say at lower levels, our own lines say with more in them.
    for name in ("uvicorn", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _TextFormatter(logging.Formatter):
    """`time level message key=value ...`; values that could break the line are JSON strings."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = [f"{name}={_plain(value)}" for name, value in _fields(record).items()]
        head = f"{_timestamp(record)} {record.levelname} {_escape(record.getMessage())}"
        return " ".join([head, *pairs]) + _traceback(self, record)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": _timestamp(record),
            "level": record.levelname,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, object] = getattr(record, "fields", {})
    return found


def _timestamp(record: logging.LogRecord) -> str:
    stamp = datetime.fromtimestamp(record.created, UTC)
    return stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: object) -> str:
    """Write a value bare where that is unambiguous, else as a JSON string."""
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.match(text) else json.dumps(text)


def _escape(message: str) -> str:
    """Keep a message on one line: a caller's text must not be able to forge another."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return f"\n{formatter.formatException(record.exc_info)}" if record.exc_info else ""


def milliseconds_since(start: float) -> float:
    """Return the milliseconds since `start`, a value of `time.perf_counter`."""
    return (time.perf_counter() - start) * 1000

"""Read the answer to one request: HTTP, server-sent events, and what they say, as bytes arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
import msgspec

from oneplusn.loadtest.dialects import Dialect, Said

DONE = b"[DONE]"
ADAPTER_HEADER = "x-oneplusn-adapter"
SHOWN_BYTES = 500
MORE_MAY_FOLLOW = (h11.Response, h11.InformationalResponse, h11.Data, h11.EndOfMessage)
Arrival = tuple[float, bytes]
"""Seconds on the clock of `time.perf_counter`, and what was read then."""


class LoadFailed(Exception):
    """The server refused a request, or did not answer it whole.

    Attributes:
        group: What failures of the same kind are counted under.
        retry_after: Seconds that the server asks to wait, if it does.
    """

    def __init__(self, message: str, *, group: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.group = group
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Answer:
    """When one request was sent and each piece of its text came back, in seconds.

    Attributes:
        sent: When the client began to connect.
        times: When each event with text arrived; one token each unless the server joins some.
        tokens: Output tokens by the server's own count, else the number of events with text.
        cached_tokens: Prompt tokens that the server took from its prefix cache.
        ended: When the stream said that it is over.
        prompt_tokens: By the server's count; None if it tells none.
        counted: Whether `tokens` is the server's count.
        versions: Adapter versions that the answer named; a whole answer names one at most.
        text: The text, if it was asked for.
    """

    sent: float
    times: tuple[float, ...]
    tokens: int
    cached_tokens: int = 0
    ended: float = 0.0
    prompt_tokens: int | None = None
    counted: bool = True
    versions: tuple[str, ...] = ()
    text: str = ""

    @property
    def first_token_s(self) -> float:
        """From sending to the first text."""
        return self.times[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """From each piece of text to the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Reader:
    """Reads one answer.

    Attributes:
        times: When each event with text was whole.
        whole: The response has come to its end.
    """

    def __init__(self, dialect: Dialect, *, keep_text: bool = False) -> None:
        self.times: list[float] = []
        self.whole = False
        self._dialect = dialect
        self._said = Said()
        self._text: list[str] | None = [] if keep_text else None
        self._http = h11.Connection(h11.CLIENT)
        self._http.send(h11.Request(method="POST", target="/", headers=[("Host", "server")]))
        self._http.send(h11.EndOfMessage())
        self._status: int | None = None
        self._retry_after: str | None = None
        self._refusal = b""
        self._rest = b""
        self._complete = False
        self._ended = 0.0

    def feed(self, when: float, data: bytes) -> None:
        """Take what was read at a moment; empty means that the connection closed.

        Raises:
            LoadFailed: It is no HTTP response, no event, or an event that tells of an error.
        """
        try:
            self._http.receive_data(data)
            while isinstance(event := self._http.next_event(), MORE_MAY_FOLLOW):
                self._take(when, event)
        except h11.RemoteProtocolError as error:
            # A connection that closes too early shows as an answer cut short.
            if data:
                msg = f"the answer is no HTTP response: {error}"
                raise LoadFailed(msg, group="no HTTP") from None

    def _take(self, when: float, event: h11.Event) -> None:
        if isinstance(event, h11.Response):
            headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            self._status = event.status_code
            self._retry_after = headers.get("retry-after")
            for label in headers.get(ADAPTER_HEADER, "").split(","):
                self._said.version(label.strip())
        elif isinstance(event, h11.Data) and self._status == HTTPStatus.OK:
            self._read_events(when, bytes(event.data))
        elif isinstance(event, h11.Data):
            self._refusal += event.data
        elif isinstance(event, h11.EndOfMessage):
            self.whole = True
            self._ended = self._ended or when

    def _read_events(self, when: float, data: bytes) -> None:
        for content in self._events(data):
            if content == DONE:
                self._complete = True
            elif text := self._dialect.read(self._decode(content), self._said):
                self.times.append(when)
                if self._text is not None:
                    self._text.append(text)
            self._ended = when

    def _events(self, data: bytes) -> Iterator[bytes]:
        """Yield the data of every event that is whole now."""
        *whole, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            lines = event.split(b"\n")
            fields = [line[5:].strip() for line in lines if line.startswith(b"data:")]
            if fields:
                yield b"\n".join(fields)

    def _decode(self, content: bytes) -> Mapping[str, Any]:
        try:
            chunk = msgspec.json.decode(content)
        except msgspec.DecodeError:
            shown = content[:SHOWN_BYTES].decode(errors="replace")
            raise LoadFailed(f"an event is no JSON: {shown}", group="no JSON") from None
        if not isinstance(chunk, dict):
            raise LoadFailed(f"an event is no object: {chunk!r}", group="no JSON")
        if "error" in chunk:
            code = _code(chunk)
            msg = f"the stream ended with an error: {chunk['error']}"
            raise LoadFailed(msg, group=f"error in the stream{code}")
        return chunk

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry the next request."""
        return self._http.their_state is h11.DONE

    def finish(self, sent: float) -> Answer:
        """Return what was read, once nothing more comes.

        Raises:
            LoadFailed: The status is not 200, or the stream ended early.
        """
        if self._status is not None and self._status != HTTPStatus.OK:
            raise self._refused(self._status)
        # A stream that ends as HTTP does, after it said why, is whole without its last mark.
        if not (self._complete or (self.whole and self._said.finished)):
            msg = "the connection closed before the end of the stream"
            raise LoadFailed(msg, group="cut short")
        counted = self._said.tokens is not None
        return Answer(
            sent=sent,
            times=tuple(self.times),
            tokens=len(self.times) if self._said.tokens is None else self._said.tokens,
            cached_tokens=self._said.cached_tokens,
            ended=self._ended,
            prompt_tokens=self._said.prompt_tokens,
            counted=counted,
            versions=tuple(self._said.versions),
            text="".join(self._text or ()),
        )

    def _refused(self, status: int) -> LoadFailed:
        try:
            code = _code(msgspec.json.decode(self._refusal))
        except msgspec.DecodeError:
            code = ""
        shown = self._refusal[:SHOWN_BYTES].decode(errors="replace")
        msg = f"the server answered {status}: {shown}"
        return LoadFailed(
            msg, group=f"HTTP {status}{code}", retry_after=_seconds(self._retry_after)
        )


def _code(content: object) -> str:
    """Return the code of an error object in brackets, empty if it has none."""
    error = content.get("error") if isinstance(content, dict) else None
    code = error.get("code") or error.get("type") if isinstance(error, dict) else None
    return f" ({code})" if code else ""


def _seconds(retry_after: str | None) -> float | None:
    """Return a `retry-after` in seconds; None if there is none, or it is a date."""
    try:
        return None if retry_after is None else max(float(retry_after), 0.0)
    except ValueError:
        return None

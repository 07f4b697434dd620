"""Send requests at the same moment over HTTP and time every token that comes back.

The client shares the machine with the server that it measures, so while a load runs it only
notes when bytes arrive; HTTP and events are parsed once the last answer is in.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import h11

DONE = b"[DONE]"
Arrival = tuple[float, bytes]
"""Seconds on the clock of `time.perf_counter`, and what was read then."""


class LoadFailed(Exception):
    """The server refused a request, or did not answer it whole."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the base model or a task, and a prompt as token ids."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int

    @property
    def body(self) -> bytes:
        """The request body of `/v1/completions`: greedy, streaming, to the last token."""
        return json.dumps(
            {
                "model": self.model,
                "prompt": list(self.prompt),
                "max_tokens": self.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """When one request was sent and each piece of its text came back, in seconds.

    Attributes:
        sent: When the request was sent.
        times: When each event with text arrived; one token each unless the server joins some.
        tokens: Output tokens by the server's own count.
        cached_tokens: Prompt tokens that the server took from its prefix cache.
    """

    sent: float
    times: tuple[float, ...]
    tokens: int
    cached_tokens: int

    @property
    def first_token_s(self) -> float:
        """From sending to the first text."""
        return self.times[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """From each piece of text to the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Summary:
    """What one load measured.

    Attributes:
        requests: Requests sent at once.
        output_tokens: Tokens that all of them got.
        cached_tokens: Prompt tokens that the server did not compute again.
        seconds: From the first request sent to the last token received.
        ttft_p50_ms: Time to first token, median.
        ttft_p99_ms: Time to first token, 99th percentile.
        gap_p50_ms: From one token of a request to its next, median.
        gap_p99_ms: From one token of a request to its next, 99th percentile.
        decode_tokens_per_s: Throughput once no request waits for its first token any more.
    """

    requests: int
    output_tokens: int
    cached_tokens: int
    seconds: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    decode_tokens_per_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole time, prompts included."""
        return self.output_tokens / self.seconds


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def summarize(answers: Sequence[Answer]) -> Summary:
    """Reduce the answers of one load to its figures."""
    first = [answer.first_token_s * 1e3 for answer in answers]
    gaps = [gap * 1e3 for answer in answers for gap in answer.gaps_s]
    start = min(answer.sent for answer in answers)
    return Summary(
        requests=len(answers),
        output_tokens=sum(answer.tokens for answer in answers),
        cached_tokens=sum(answer.cached_tokens for answer in answers),
        seconds=max(answer.times[-1] for answer in answers) - start,
        ttft_p50_ms=percentile(first, 50),
        ttft_p99_ms=percentile(first, 99),
        gap_p50_ms=percentile(gaps, 50),
        gap_p99_ms=percentile(gaps, 99),
        decode_tokens_per_s=_decode_rate(answers),
    )


def _decode_rate(answers: Sequence[Answer]) -> float:
    """Return the tokens per second from the moment when every request has its first token."""
    start = max(answer.times[0] for answer in answers)
    end = max(answer.times[-1] for answer in answers)
    return sum(when > start for answer in answers for when in answer.times) / (end - start)


async def send_all(address: str, asks: Sequence[Ask], *, limit_s: float) -> list[Answer]:
    """Send every request at once and wait for the last answer.

    Raises:
        LoadFailed: A request was refused or cut short, or `limit_s` passed.
    """
    try:
        async with asyncio.timeout(limit_s):
            exchanges = await asyncio.gather(*(_exchange(address, ask) for ask in asks))
    except TimeoutError:
        msg = f"{len(asks)} requests were not answered within {limit_s:.0f} s"
        raise LoadFailed(msg) from None
    except OSError as error:
        msg = f"the server at {address} cannot be reached: {error}"
        raise LoadFailed(msg) from None
    return [read_answer(exchange.sent, exchange.arrivals) for exchange in exchanges]


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own, and the bytes that answer it."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.sent = 0.0
        self.arrivals: list[Arrival] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.WriteTransport)
        self.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note what came when."""
        self.arrivals.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake who waits; a broken connection shows as an answer cut short."""
        if not self.closed.done():
            self.closed.set_result(None)


async def _exchange(address: str, ask: Ask) -> _Exchange:
    """Send one request and wait until the server closes the connection."""
    url = urlsplit(address)
    assert url.hostname is not None
    assert url.port is not None
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(ask.body)}\r\n\r\n"
    )
    transport, exchange = await asyncio.get_running_loop().create_connection(
        lambda: _Exchange(head.encode() + ask.body), url.hostname, url.port
    )
    try:
        await exchange.closed
    finally:
        transport.close()
    return exchange


def read_answer(sent: float, arrivals: Iterable[Arrival]) -> Answer:
    """Parse the bytes that answered a request sent at `sent`.

    Raises:
        LoadFailed: The status is not 200, the stream tells of an error, or it ends early.
    """
    times = list[float]()
    usage: dict[str, Any] | None = None
    for when, event in _events(_body(arrivals)):
        if event == DONE:
            if usage is None or not times:
                raise LoadFailed("the stream ended without text or without usage")
            details = usage.get("prompt_tokens_details") or {}
            return Answer(
                sent=sent,
                times=tuple(times),
                tokens=usage["completion_tokens"],
                cached_tokens=details.get("cached_tokens", 0),
            )
        chunk = json.loads(event)
        if "error" in chunk:
            msg = f"the stream ended with an error: {chunk['error']}"
            raise LoadFailed(msg)
        if any(choice["text"] for choice in chunk["choices"]):
            times.append(when)
        usage = chunk.get("usage") or usage
    raise LoadFailed("the connection closed before the end of the stream")


def _body(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """Yield the pieces of the response body, each with the time of its last byte.

    Raises:
        LoadFailed: The status is not 200, or the bytes are no HTTP response.
    """
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "server")]))
    connection.send(h11.EndOfMessage())
    refused: int | None = None
    reason = b""
    try:
        for when, data in arrivals:
            connection.receive_data(data)
            while True:
                event = connection.next_event()
                if isinstance(event, h11.Response) and event.status_code != HTTPStatus.OK:
                    refused = event.status_code
                elif isinstance(event, h11.Data) and refused is None:
                    yield when, bytes(event.data)
                elif isinstance(event, h11.Data):
                    reason += event.data
                elif not isinstance(event, h11.Response | h11.InformationalResponse):
                    break
    except h11.RemoteProtocolError as error:
        msg = f"the answer is no HTTP response: {error}"
        raise LoadFailed(msg) from None
    if refused is not None:
        msg = f"the server answered {refused}: {reason[:500].decode(errors='replace')}"
        raise LoadFailed(msg)


def _events(body: Iterable[Arrival]) -> Iterator[Arrival]:
    """Yield the data of server-sent events, each with the time at which it was whole."""
    rest = b""
    for when, data in body:
        *whole, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            lines = event.split(b"\n")
            fields = [line[5:].strip() for line in lines if line.startswith(b"data:")]
            if fields:
                yield when, b"\n".join(fields)

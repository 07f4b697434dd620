"""Send requests at the same moment over HTTP and time every token that comes back.

The client shares the machine with the server that it measures, so while a load runs it only
notes when bytes arrive; HTTP and events are parsed once the last answer is in.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.exchange import Exchange, Pool
from oneplusn.loadtest.stats import percentile
from oneplusn.loadtest.stream import Answer, LoadFailed, read_answer
from oneplusn.loadtest.transport import Server, reach

ROUTE = DIALECTS["completions"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the base model or a task, and a prompt as token ids."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int

    @property
    def body(self) -> bytes:
        """The request body of `/v1/completions`: greedy, streaming, to the last token."""
        return json.dumps(ROUTE.body(self.model, self.prompt, self.max_tokens)).encode()


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
    server = reach(address)
    exchanges = await asyncio.gather(*(_exchange(server, ask, limit_s) for ask in asks))
    answers = [read_answer(exchange.sent, exchange.arrivals, ROUTE) for exchange in exchanges]
    if not all(answer.times and answer.counted for answer in answers):
        raise LoadFailed("a stream ended without text or without usage", group="incomplete")
    return answers


async def _exchange(server: Server, ask: Ask, limit_s: float) -> Exchange:
    """Send one request and wait until the server closes the connection."""
    exchange = Exchange(server.post(ROUTE.path, ask.body, close=True), None)
    await exchange.run(Pool(server), limit_s=limit_s)
    return exchange

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from oneplusn.loadtest.client import Ask, send_all, summarize
from oneplusn.loadtest.stream import Answer, LoadFailed

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
)
USAGE = (
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2,'
    b' "prompt_tokens_details": {"cached_tokens": 1}}}\n\n'
)
DONE = b"data: [DONE]\n\n"


def text(piece: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": piece}]}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_the_figures_of_two_requests() -> None:
    answers = [
        Answer(sent=10.0, times=(11.0, 11.5, 12.0), tokens=3, cached_tokens=0),
        Answer(sent=10.5, times=(11.25, 13.25, 14.0), tokens=3, cached_tokens=4),
    ]

    found = summarize(answers)

    assert found.requests == 2
    assert found.output_tokens == 6
    assert found.cached_tokens == 4
    assert found.seconds == 4.0  # 10.0 to 14.0
    assert found.tokens_per_s == 1.5
    assert found.ttft_p50_ms == 750.0  # of 1000 and 750
    assert found.ttft_p99_ms == 1000.0
    assert found.gap_p50_ms == 500.0  # of 500, 500, 2000 and 750
    assert found.gap_p99_ms == 2000.0
    assert found.decode_tokens_per_s == 4 / 2.75  # four tokens from 11.25 to 14.0


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def load(handler: Handler, asks: list[Ask], *, limit_s: float = 10.0) -> list[Answer]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        return await send_all(f"http://127.0.0.1:{port}", asks, limit_s=limit_s)


async def read_body(reader: asyncio.StreamReader) -> dict[str, object]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return json.loads(await reader.readexactly(length))


def test_all_requests_are_in_flight_before_the_first_is_answered() -> None:
    asks = [Ask(f"task-{i}", (5, 6, 7), max_tokens=2) for i in range(3)]
    bodies = list[dict[str, object]]()

    async def run() -> list[Answer]:
        together = asyncio.Barrier(len(asks))

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            bodies.append(await read_body(reader))
            await together.wait()
            writer.write(HEAD + b"".join(map(chunk, (text("a"), text("b"), USAGE, DONE))))
            writer.close()

        return await load(answer, asks)

    answers = asyncio.run(run())

    assert [answer.tokens for answer in answers] == [2, 2, 2]
    assert max(answer.sent for answer in answers) < min(answer.times[0] for answer in answers)
    assert sorted(bodies, key=lambda body: str(body["model"])) == [
        {
            "model": f"task-{i}",
            "prompt": [5, 6, 7],
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(3)
    ]


def test_a_server_that_stays_silent_ends_the_load() -> None:
    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    with pytest.raises(LoadFailed, match=r"no end of the answer within 0\.2 s"):
        asyncio.run(load(stay_silent, [Ask("base", (3,), 2)], limit_s=0.2))


@pytest.mark.parametrize("events", [[text("a"), text("b"), DONE], [USAGE, DONE]])
def test_figures_need_text_and_the_servers_own_count(events: list[bytes]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await read_body(reader)
            writer.write(HEAD + b"".join(map(chunk, events)))
        writer.close()

    with pytest.raises(LoadFailed, match="without text or without usage"):
        asyncio.run(load(answer, [Ask("base", (3,), 2)]))


def test_a_server_that_is_not_there_is_said_so() -> None:
    with pytest.raises(LoadFailed, match="cannot be reached"):
        asyncio.run(send_all("http://127.0.0.1:1", [Ask("base", (3,), 2)], limit_s=10))

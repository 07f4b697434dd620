from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from oneplusn.loadtest.client import (
    Answer,
    Ask,
    LoadFailed,
    percentile,
    read_answer,
    send_all,
    summarize,
)

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


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 50, 7.0),
        ([7.0], 99, 7.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 75, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 76, 4.0),
        ([float(i) for i in range(1, 101)], 99, 99.0),
        ([float(i) for i in range(1, 101)], 100, 100.0),
        ([1.0, 2.0], 0, 1.0),
    ],
)
def test_percentile_is_a_value_that_was_measured(values, percent, expected) -> None:
    assert percentile(values, percent) == expected


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


@pytest.mark.parametrize(
    ("arrivals", "times"),
    [
        pytest.param(
            [
                (1.0, HEAD),
                (2.0, chunk(text("a"))),
                (3.0, chunk(text("b"))),
                (4.0, chunk(USAGE) + chunk(DONE) + b"0\r\n\r\n"),
            ],
            (2.0, 3.0),
            id="event-per-read",
        ),
        pytest.param(
            [(1.0, HEAD + b"".join(map(chunk, (text("a"), text("b"), USAGE, DONE))))],
            (1.0, 1.0),
            id="all-in-one-read",
        ),
        pytest.param(
            [
                (1.0, HEAD + chunk(text("a") + text("b")[:9])),
                (2.0, chunk(text("b")[9:-1])),
                (3.0, chunk(b"\n" + USAGE + DONE)),
            ],
            (1.0, 3.0),
            id="event-over-three-reads",
        ),
        pytest.param(
            [
                (1.0, HEAD + chunk(b": ping\n\n" + text(""))),
                (2.0, chunk(text("a").replace(b"\n", b"\r\n"))),
                (3.0, chunk(USAGE + DONE)),
            ],
            (2.0,),
            id="comment-empty-text-crlf",
        ),
    ],
)
def test_a_token_is_timed_when_its_event_is_whole(arrivals, times) -> None:
    answer = read_answer(0.5, arrivals)

    assert answer == Answer(sent=0.5, times=times, tokens=2, cached_tokens=1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 7\r\n\r\nno task", "answered 404: no task"),
        (HEAD + chunk(text("a")), "before the end of the stream"),
        (HEAD + chunk(text("a") + DONE), "without usage"),
        (HEAD + chunk(USAGE + DONE), "without text"),
        (HEAD + chunk(b'data: {"error": {"code": "stopped"}}\n\n'), "stopped"),
        (b"SSH-2.0-x\r\n\r\n", "no HTTP response"),
        (HEAD, "before the end of the stream"),
    ],
)
def test_an_answer_that_is_none_is_refused(data, reason) -> None:
    with pytest.raises(LoadFailed, match=reason):
        read_answer(0.0, [(1.0, data)])


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

    with pytest.raises(LoadFailed, match="1 requests were not answered within 0"):
        asyncio.run(load(stay_silent, [Ask("base", (3,), 2)], limit_s=0.2))


def test_a_server_that_is_not_there_is_said_so() -> None:
    with pytest.raises(LoadFailed, match="cannot be reached"):
        asyncio.run(send_all("http://127.0.0.1:1", [Ask("base", (3,), 2)], limit_s=10))

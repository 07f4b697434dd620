from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from oneplusn.loadtest.fixtures import SHAPES, Fixtures, build

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Fixtures:
    """The tiny model with five LoRAs and two clusters, as a benchmark of five requests has them."""
    made = Fixtures(tmp_path_factory.mktemp("fixtures"), requests=5)
    build(made, SHAPES["tiny"])
    return made


@dataclass
class Received:
    """A request as the scripted server got it, and when it wrote each event with text."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    came: float
    written: list[float] = field(default_factory=list)

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def is_stream(self) -> bool:
        return self.path == "/generate_stream" or b'"stream": true' in self.body


@dataclass(frozen=True)
class Script:
    """What is answered: a stream with known delays, or something else."""

    first_s: float = 0.0
    gap_s: float = 0.0
    events: int = 4
    word: str = "a"
    joined: int = 1
    adapter: str | None = None
    usage: bool = True
    status: int = 200
    headers: tuple[str, ...] = ()
    content: bytes = b"{}"
    dies_after: int | None = None
    hangs_up: bool = False


Behaviour = Callable[[Received], Script]


class ScriptedServer:
    """A server on a real socket, on a thread of its own, that does what it is told."""

    def __init__(self, behave: Behaviour, *, one_at_a_time: bool = False) -> None:
        self.requests: list[Received] = []
        self._behave = behave
        self._one_at_a_time = one_at_a_time
        self._loop = asyncio.new_event_loop()

    @property
    def streams(self) -> list[Received]:
        return [request for request in self.requests if request.written]

    @contextmanager
    def running(self) -> Iterator[ScriptedServer]:
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        self._turn = asyncio.Semaphore(1 if self._one_at_a_time else 1000)
        server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000))
        self.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            self._call(self._end(server))
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _end(self, server: asyncio.Server) -> None:
        # Who connected before this one is served by now, and so can be closed.
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write_eof()
        await reader.read()
        writer.close()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await _receive(reader)
                self.requests.append(request)
                async with self._turn:
                    await self._answer(request, self._behave(request), writer)
                if request.headers.get("connection") == "close":
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # a client that only looked whether somebody listens, or that went away
        finally:
            writer.close()

    async def _answer(
        self, request: Received, script: Script, writer: asyncio.StreamWriter
    ) -> None:
        if script.status != 200 or not request.is_stream:
            lines = [f"HTTP/1.1 {script.status} X", f"content-length: {len(script.content)}"]
            writer.write("\r\n".join([*lines, *script.headers, "\r\n"]).encode() + script.content)
            return
        adapter = f"x-oneplusn-adapter: {script.adapter}\r\n".encode() if script.adapter else b""
        writer.write(HEAD + adapter + b"transfer-encoding: chunked\r\n\r\n")
        extension = {"oneplusn": {"adapter": script.adapter}}
        for index in range(script.events):
            await asyncio.sleep(script.gap_s if index else script.first_s)
            if index == script.dies_after:
                writer.transport.abort()
                return
            text = f" {script.word}" * script.joined
            request.written.append(time.perf_counter())
            await _send(writer, {"choices": [{"text": text}], **extension})
        await _send(writer, {"choices": [{"text": "", "finish_reason": "length"}]})
        if script.usage:
            counts = {"prompt_tokens": 7, "completion_tokens": script.events * script.joined}
            await _send(writer, {"choices": [], "usage": counts})
        await _send(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        if script.hangs_up:
            writer.close()


async def _receive(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *fields = head.strip().split("\r\n")
    method, path, _ = line.split(" ")
    headers = dict(item.lower().split(": ", 1) for item in fields)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, path, headers, body, time.perf_counter())


async def _send(writer: asyncio.StreamWriter, event: object) -> None:
    data = event if isinstance(event, str) else json.dumps(event)
    payload = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(payload), payload))
    await writer.drain()


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Start scripted servers; they end with the test."""
    with ExitStack() as stack:
        yield lambda behave, **options: stack.enter_context(
            ScriptedServer(behave, **options).running()
        )


@pytest.fixture
def script() -> type[Script]:
    return Script

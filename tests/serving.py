"""A server with a scripted engine behind it, on a real port, in threads of the test's process.

The engine's loop, its socket and its messages are those of a real server; what is scripted is what
a step computes, and jobs of workers run in this process.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI

from oneplusn.demo.tokenizer import build_tokenizer
from oneplusn.errors import OneplusnError
from oneplusn.server.app import create_app
from oneplusn.server.channel import EngineEnd
from oneplusn.server.engine_process import Loop
from oneplusn.server.jobs import JOBS
from oneplusn.server.messages import Fatal, Freed, Loaded, Ready, TokenOutput
from oneplusn.server.serve import uvicorn_config
from oneplusn.server.settings import Settings
from oneplusn.server.state import Server
from oneplusn.server.streams import TokenStream
from oneplusn.server.supervisor import Launch
from oneplusn.server.workers import Workers
from scripted_engine import CONTEXT as CONTEXT
from scripted_engine import VOCAB as VOCAB
from scripted_engine import ScriptedCore, ready_message

HEARTBEAT_S = 0.01


class _Killed(BaseException):
    """Ends the thread of an engine."""


class _Mortal:
    """A core that can be killed from another thread: the loop asks it for news at every turn."""

    def __init__(self, core: ScriptedCore, killed: threading.Event) -> None:
        self._core = core
        self._killed = killed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def poll(self) -> list[Loaded | Freed]:
        if self._killed.is_set():
            raise _Killed
        return self._core.poll()


class EngineThread:
    """An engine on a thread, in place of the child process of a server."""

    def __init__(self, core: ScriptedCore, ready: Ready, address: str) -> None:
        self._core = core
        self._ready = ready
        self._address = address
        self._killed = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        threading.Thread(target=self._run, name="engine").start()

    async def wait(self) -> str:
        await self._ended.wait()
        return "ended"

    def kill(self) -> None:
        self._killed.set()

    def _serve(self, channel: EngineEnd) -> None:
        self._core.begin()
        core: Any = _Mortal(self._core, self._killed)
        Loop(core, channel, lambda load: load, heartbeat=HEARTBEAT_S).run(self._ready)

    def _run(self) -> None:
        channel = EngineEnd(self._address)
        try:
            self._serve(channel)
        except _Killed:
            pass
        except Exception as error:
            kind = type(error).__name__ if isinstance(error, OneplusnError) else "EngineStopped"
            channel.send(Fatal(str(error), kind))
        finally:
            channel.close()
            with suppress(RuntimeError):  # the event loop may be closed
                self._loop.call_soon_threadsafe(self._ended.set)


def launch(core: ScriptedCore, folder: Path, context: int = CONTEXT) -> Launch:
    """Start engines that share a script, for a model whose tokenizer is made in `folder`."""
    build_tokenizer(folder)
    return lambda address: EngineThread(core, ready_message(folder, context), address)


async def outputs_of(stream: TokenStream) -> AsyncIterator[TokenOutput]:
    """Read a stream as whoever answers it does."""
    while True:
        await stream.wake.wait()
        stream.wake.clear()
        failure = stream.failure
        for output in stream.take():
            yield output
            if output.finish is not None:
                return
        if failure is not None:
            raise failure


class InlineWorkers(Workers):
    """Do the jobs of workers in this process, where torch is loaded already."""

    def start(self) -> None:
        pass

    async def run(self, kind: str, request: msgspec.Struct, result: type) -> Any:
        return await asyncio.to_thread(import_module(JOBS[kind].module).run, request)


@dataclass
class Live:
    """A running server: where it listens, and what is behind it."""

    url: str
    core: ScriptedCore
    server: Server
    app: FastAPI
    uvicorn: uvicorn.Server

    @property
    def listener(self) -> socket.socket:
        """What it listens on; those that it accepts have its options."""
        return self.uvicorn.servers[0].sockets[0]


@contextmanager
def serving(
    settings: Settings,
    folder: Path,
    core: ScriptedCore | None = None,
    *,
    context: int = CONTEXT,
) -> Iterator[Live]:
    """Serve until the block ends; it starts when every adapter is loaded."""
    core = core or ScriptedCore()
    failures: list[BaseException] = []
    app = create_app(
        settings,
        launch(core, folder, context),
        workers=InlineWorkers.of(settings),
        on_failure=failures.append,
    )
    uvicorn_server = uvicorn.Server(uvicorn_config(app))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    server: Server = app.state.server
    try:
        wait_until(lambda: bool(failures) or (uvicorn_server.started and server.ready))
        if failures:
            raise failures[0]
        port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", core, server, app, uvicorn_server)
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Look at a condition of another thread until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)

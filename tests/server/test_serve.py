"""How a server stops: the process's signals, on the event loop that serves."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from oneplusn.server.app import create_app
from oneplusn.server.serve import Runner, uvicorn_config
from oneplusn.server.settings import Settings
from scripted_engine import ScriptedCore
from serving import InlineWorkers, launch, wait_until

pytestmark = pytest.mark.anyio

ENDLESS = {"task": None, "inputs": "endless", "parameters": {"max_new_tokens": 200}}


@dataclass
class Served:
    """A server on the test's own event loop."""

    runner: Runner
    stopped: asyncio.Task[None]
    http: httpx.AsyncClient
    core: ScriptedCore

    async def code(self, path: str = "/health/ready") -> str | None:
        answer = await self.http.get(path)
        return answer.json().get("error", {}).get("code")

    async def in_flight(self) -> asyncio.Task[httpx.Response]:
        """Send a request that will not be finished, and wait until the engine has it."""
        self.core.paused = True
        request = asyncio.create_task(self.http.post("/generate", json=ENDLESS))
        await asyncio.to_thread(wait_until, lambda: bool(self.core.requests))
        return request


@pytest.fixture
def drain_seconds() -> float:
    return 30


@pytest.fixture
async def served(tmp_path, drain_seconds) -> AsyncIterator[Served]:
    core = ScriptedCore()
    app = create_app(Settings(model="m"), launch(core, tmp_path), workers=InlineWorkers())
    runner = Runner(uvicorn_config(app), app.state.server, drain_seconds=drain_seconds)
    stopped = asyncio.create_task(runner.serve())
    await asyncio.to_thread(wait_until, lambda: runner.started and app.state.server.ready)
    port = runner.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        yield Served(runner, stopped, http, core)
    runner.should_exit = True
    await stopped


async def test_the_first_signal_drains_and_waits_for_what_is_in_flight(served) -> None:
    request = await served.in_flight()

    os.kill(os.getpid(), signal.SIGTERM)

    # Told at once, on old connections and on new ones.
    assert await served.code() == "draining"
    answer = await served.http.post("/generate", json=ENDLESS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert await served.code("/health/live") is None
    assert not served.stopped.done()
    served.core.paused = False
    answer = await request
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["generated_text"]) == 200
    await asyncio.wait_for(served.stopped, 5)
    assert not served.runner.interrupted


async def test_without_requests_it_stops_at_once(served) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(served.stopped, 5)
    assert served.runner.interrupted


async def test_the_second_signal_ends_what_is_in_flight(served) -> None:
    request = await served.in_flight()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await served.code() == "draining"
    os.kill(os.getpid(), signal.SIGTERM)
    answer = await request
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    await asyncio.wait_for(served.stopped, 5)


@pytest.mark.parametrize("drain_seconds", [0.05])
async def test_so_does_the_end_of_its_time(served) -> None:
    request = await served.in_flight()
    os.kill(os.getpid(), signal.SIGTERM)
    answer = await request
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    await asyncio.wait_for(served.stopped, 5)

"""How often an engine is started again, after which pause, and when nothing more is tried."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from oneplusn.errors import EngineStopped, StartupError
from oneplusn.server import supervisor
from oneplusn.server.bridge import AsyncEngine
from oneplusn.server.channel import EngineEnd
from oneplusn.server.messages import Sampling, Submit
from oneplusn.server.metrics import Metrics
from scripted_engine import ScriptedCore, ready_message
from serving import EngineThread, launch, outputs_of, wait_until

SUBMIT = Submit("id", [104], (), Sampling(max_tokens=4))


class Lives:
    """Starts engines that share a script, and keeps hold of them."""

    def __init__(self, folder: Path, core: ScriptedCore) -> None:
        self.core = core
        self.begun: list[EngineThread] = []
        self.start = launch(core, folder)

    def __call__(self, address: str) -> EngineThread:
        self.begun.append(self.start(address))
        return self.begun[-1]


@pytest.fixture
def core() -> ScriptedCore:
    return ScriptedCore()


@pytest.fixture
def lives(core, tmp_path) -> Lives:
    return Lives(tmp_path, core)


@pytest.fixture
async def engine(lives) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(lives, Metrics(), max_queue=9, step_timeout=0.2)
    await engine.start()
    yield engine
    await engine.close()


async def until(condition) -> None:
    await asyncio.to_thread(wait_until, condition)


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (7, 30), (60, 30)]
)
def test_the_pause_doubles_up_to_half_a_minute(failures, seconds) -> None:
    assert supervisor._pause(failures) == seconds


class TestInARow:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch) -> None:
        monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.001)

    @pytest.mark.anyio
    async def test_after_five_nothing_is_tried_any_more(self, engine, lives) -> None:
        for life in range(1, supervisor.MAX_FAILURES + 1):
            assert engine.alive
            await until(lambda life=life: len(lives.begun) == life and engine.ready)
            lives.begun[-1].kill()
            await until(lambda life=life: engine.restarts == life or not engine.alive)

        assert not engine.alive
        assert engine.restarts == supervisor.MAX_FAILURES - 1
        with pytest.raises(EngineStopped, match="must be restarted") as caught:
            engine.stream(SUBMIT)
        assert caught.value.code == "engine_dead"

    @pytest.mark.anyio
    async def test_a_request_that_was_finished_begins_the_count_again(self, engine, lives) -> None:
        for life in range(1, 2 * supervisor.MAX_FAILURES):
            await until(lambda life=life: len(lives.begun) == life and engine.ready)
            outputs = outputs_of(engine.stream(SUBMIT))
            assert [output.token async for output in outputs] == [104, 257]
            lives.begun[-1].kill()
            await until(lambda life=life: engine.restarts == life)
        assert engine.alive

    @pytest.mark.anyio
    async def test_so_does_a_minute_of_readiness(self, engine, lives, monkeypatch) -> None:
        monkeypatch.setattr(supervisor, "PROVEN_S", -1.0)
        for life in range(1, 2 * supervisor.MAX_FAILURES):
            await until(lambda life=life: len(lives.begun) == life and engine.ready)
            lives.begun[-1].kill()
            await until(lambda life=life: engine.restarts == life)
        assert engine.alive


class TestHang:
    @pytest.mark.anyio
    async def test_a_step_that_never_ends_is_a_failure(self, engine, core, monkeypatch) -> None:
        released = threading.Event()
        step = core.step
        monkeypatch.setattr(core, "step", lambda: (released.wait(10), step())[1])
        stream = engine.stream(SUBMIT)
        with pytest.raises(EngineStopped) as caught:
            await asyncio.wait_for(anext(outputs_of(stream)), 5)
        assert caught.value.code == "engine_dead"
        released.set()  # what SIGKILL does to a process
        await until(lambda: engine.ready)
        assert engine.restarts == 1

    @pytest.mark.anyio
    async def test_nothing_to_do_is_none(self, engine) -> None:
        await asyncio.sleep(3 * 0.2)
        assert (engine.restarts, engine.ready) == (0, True)

    @pytest.mark.anyio
    async def test_a_loop_that_turns_while_a_request_waits_is_none(self, engine, core) -> None:
        core.paused = True
        engine.stream(SUBMIT)
        await asyncio.sleep(3 * 0.2)
        assert (engine.restarts, engine.unfinished) == (0, 1)


@pytest.mark.anyio
async def test_an_engine_that_cannot_even_be_started_is_said(engine, lives, caplog) -> None:
    def refuse(address: str) -> EngineThread:
        raise OSError("no memory for another process")

    lives.start = refuse
    lives.begun[-1].kill()
    await until(lambda: not engine.alive)
    assert engine.failure is not None
    assert "must be restarted" in str(engine.failure)
    assert "no memory for another process" in caplog.text


class Stillborn(EngineThread):
    def _serve(self, channel: EngineEnd) -> None:
        """End without a word."""


@pytest.mark.anyio
async def test_an_engine_that_dies_before_it_is_ready_ends_the_start(core, tmp_path) -> None:
    ready = ready_message(tmp_path)
    engine = AsyncEngine(lambda at: Stillborn(core, ready, at), Metrics(), max_queue=1)
    with pytest.raises(StartupError, match="the engine ended while it loaded the model"):
        await engine.start()
    assert (engine.alive, engine.restarts) == (False, 0)
    await engine.close()

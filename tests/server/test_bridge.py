"""The engine as the API sees it: a scripted one behind the real socket, loop and supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    ModelRefused,
    PoolExhausted,
    QueueFull,
    RequestCancelled,
    ServingError,
)
from oneplusn.server.bridge import AsyncEngine
from oneplusn.server.messages import Sampling, Submit, TokenOutput
from oneplusn.server.metrics import Metrics
from oneplusn.server.streams import MAX_BUFFERED, TokenStream
from scripted_engine import ScriptedCore, ready_message
from serving import EngineThread, launch, outputs_of, wait_until

pytestmark = pytest.mark.anyio

FIRST, SECOND = "sha256:first", "sha256:second"


@pytest.fixture
def core() -> ScriptedCore:
    return ScriptedCore(step_seconds=0)


@pytest.fixture
async def engine(core, tmp_path) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(launch(core, tmp_path), Metrics(), max_queue=3)
    await engine.start()
    yield engine
    await engine.close()


def submit(text: str, name: str = "id", *digests: str, max_tokens: int = 1000) -> Submit:
    refs = tuple(TaskRef(digest, "task") for digest in digests)
    return Submit(name, list(text.encode()), refs, Sampling(max_tokens=max_tokens))


async def text_of(stream: TokenStream) -> str:
    tokens = [output.token async for output in outputs_of(stream)]
    return bytes(token for token in tokens if token is not None and token < 256).decode()


async def until(condition) -> None:
    await asyncio.to_thread(wait_until, condition)


class TestStreams:
    async def test_every_token_comes_in_order(self, engine) -> None:
        stream = engine.stream(submit("hi"))
        outputs = [output async for output in outputs_of(stream)]
        assert [output.token for output in outputs] == [*b"hi", 257]
        assert stream.first is not None
        assert stream.submitted <= stream.first <= stream.last
        assert engine.unfinished == 0

    async def test_the_queue_has_an_end(self, engine, core) -> None:
        core.paused = True
        for name in "abc":
            engine.stream(submit("hi", name))
        with pytest.raises(QueueFull):
            engine.stream(submit("hi", "d"))

    async def test_a_closed_stream_is_cancelled_before_the_next_step(self, engine, core) -> None:
        core.step_seconds = 0.01
        stream = engine.stream(submit("endless", max_tokens=100_000))
        await anext(outputs_of(stream))

        before = core.steps
        stream.close()
        await asyncio.to_thread(core.cancelled_once.wait, 10)

        # One step may have begun before the message was there.
        assert core.steps <= before + 2
        assert core.requests == {}

    async def test_a_reader_that_is_too_slow_is_cut_and_the_others_go_on(
        self, engine, core
    ) -> None:
        slow = engine.stream(submit("endless", "slow", max_tokens=10 * MAX_BUFFERED))
        quick = engine.stream(submit("x" * 200, "quick"))

        assert await text_of(quick) == "x" * 200
        await asyncio.to_thread(core.cancelled_once.wait, 10)
        with pytest.raises(RequestCancelled, match="read the stream faster"):
            await anext(outputs_of(slow))
        assert core.cancelled == ["slow"]

    async def test_the_engine_does_not_wait_for_the_event_loop(self, engine, core) -> None:
        stream = engine.stream(submit("x" * 90))
        wait_until(lambda: core.submitted != [] and not core.requests)
        assert len([output async for output in outputs_of(stream)]) == 91

    async def test_a_refusal_keeps_its_class_and_what_it_says(self, engine) -> None:
        stream = engine.stream(Submit("id", [99_999], (), Sampling(max_tokens=1)))
        with pytest.raises(InvalidRequest, match="no such token") as caught:
            await anext(outputs_of(stream))
        assert (caught.value.code, caught.value.param) == ("invalid_value", "prompt")

    @pytest.mark.parametrize(
        ("finish", "error", "raised", "said"),
        [
            ("error", "it overflowed", ServingError, "it overflowed"),
            ("abort", None, RequestCancelled, "was cancelled"),
            ("abort", "its adapter left", RequestCancelled, "its adapter left"),
            ("timeout", None, DeadlineExceeded, "timeout passed"),
        ],
    )
    async def test_ends_without_a_token_are_errors(self, finish, error, raised, said) -> None:
        stream = TokenStream(submit("hi"), release=lambda _: None)
        stream.push(TokenOutput("id", 104))
        stream.push(TokenOutput("id", finish=finish, error=error))
        outputs = outputs_of(stream)
        assert (await anext(outputs)).token == 104
        with pytest.raises(raised, match=said):
            await anext(outputs)


class TestAdapters:
    async def test_a_version_comes_and_leaves(self, engine) -> None:
        assert await engine.load(FIRST, "/image") == 1000
        assert engine.resident == {FIRST}
        assert await text_of(engine.stream(submit("hi", "a", FIRST))) == "TASK*1:hi"
        assert await engine.unload(FIRST) == 1000
        assert engine.resident == set()

    async def test_whoever_loads_the_same_waits_for_the_same(self, engine, core) -> None:
        loads = [engine.load(FIRST, "/image") for _ in range(3)]
        assert await asyncio.gather(*loads) == [1000] * 3
        assert core.resident.keys() == {FIRST}

    async def test_a_version_leaves_when_its_last_request_has_ended(self, engine, core) -> None:
        await engine.load(FIRST, "/image")
        core.paused = True
        stream = engine.stream(submit("hi", "a", FIRST))
        leaving = asyncio.create_task(engine.unload(FIRST))
        await until(lambda: core.leaving == {FIRST})
        assert not leaving.done()
        core.paused = False
        assert await text_of(stream) == "TASK*1:hi"
        assert await leaving == 1000

    async def test_what_does_not_fit_is_refused_with_its_class(self, engine, core) -> None:
        core.capacity = 0
        with pytest.raises(PoolExhausted, match="no room"):
            await engine.load(FIRST, "/image")
        assert engine.resident == set()

    async def test_what_is_not_there_cannot_be_unloaded(self, engine) -> None:
        with pytest.raises(AdapterNotFound, match="nothing to unload"):
            await engine.unload(FIRST)

    async def test_an_evicted_version_comes_back_for_the_request_that_needs_it(
        self, engine, core
    ) -> None:
        engine.locate = located = Located()
        await engine.load(FIRST, "/image")
        core.evict(FIRST)
        await until(lambda: engine.resident == set())

        assert await text_of(engine.stream(submit("hi", "a", FIRST))) == "TASK*1:hi"
        assert located.asked == [FIRST]
        assert engine.resident == {FIRST}

    async def test_one_that_leaves_while_the_request_is_on_its_way_does_too(
        self, engine, core
    ) -> None:
        engine.locate = Located()
        await engine.load(FIRST, "/image")
        stream = engine.stream(submit("hi", "a", FIRST))
        core.evict(FIRST)  # before the engine's thread can have looked at the request
        assert await text_of(stream) == "TASK*1:hi"

    @pytest.mark.parametrize(
        ("error", "raised", "said"),
        [
            (AdapterCorrupt("its files are damaged"), AdapterCorrupt, "damaged"),
            (RuntimeError("a fault of ours"), ServingError, "could not be brought"),
        ],
    )
    async def test_a_version_that_cannot_be_found_fails_the_request(
        self, engine, error, raised, said
    ) -> None:
        engine.locate = Located(error)
        with pytest.raises(raised, match=said):
            await text_of(engine.stream(submit("hi", "a", FIRST)))
        assert await text_of(engine.stream(submit("hi", "b"))) == "hi"

    async def test_a_request_that_is_given_up_meanwhile_is_never_sent(self, engine, core) -> None:
        engine.locate = located = Located()
        located.found.clear()
        engine.stream(submit("hi", "a", FIRST)).close()
        located.found.set()
        assert await text_of(engine.stream(submit("hi", "b"))) == "hi"
        assert [message.id for message in core.submitted] == ["b"]


class Located:
    """Stands for the data folder: every version has an image, or none has."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[str] = []
        self.found = asyncio.Event()
        self.found.set()
        self._error = error

    async def __call__(self, digest: str) -> str:
        self.asked.append(digest)
        await self.found.wait()
        if self._error is not None:
            raise self._error
        return f"/images/{digest}"


class TestLife:
    async def test_nothing_is_accepted_before_the_start(self, core, tmp_path) -> None:
        engine = AsyncEngine(launch(core, tmp_path), Metrics(), max_queue=1)
        assert (engine.ready, engine.alive, engine.info) == (False, True, None)
        with pytest.raises(EngineStopped, match="loading"):
            engine.stream(submit("hi"))

    async def test_it_says_what_it_serves(self, engine, tmp_path) -> None:
        assert engine.info == ready_message(tmp_path)
        assert engine.info.layout.sites == engine.info.sites

    async def test_a_model_that_is_refused_ends_the_start(self, core, tmp_path) -> None:
        engine = AsyncEngine(Refusing(tmp_path), Metrics(), max_queue=1)
        with pytest.raises(ModelRefused, match="ignores the hook"):
            await engine.start()
        assert not engine.alive
        await engine.close()

    async def test_closing_ends_what_is_in_flight(self, engine, core) -> None:
        core.paused = True
        stream = engine.stream(submit("hi"))
        await engine.close()
        with pytest.raises(EngineStopped, match="shutting down"):
            await anext(outputs_of(stream))

    async def test_a_fault_fails_what_is_in_flight_and_the_adapters_come_back(
        self, engine, core
    ) -> None:
        ready_before = []

        async def restore() -> None:
            ready_before.append(engine.ready)
            await engine.load(FIRST, "/image", pin=True)

        engine.on_ready = restore
        await engine.load(FIRST, "/image", pin=True)
        streams = [engine.stream(submit("endless", "a")), engine.stream(submit("crash", "b"))]

        for stream in streams:
            with pytest.raises(EngineStopped) as caught:
                await text_of(stream)
            assert (caught.value.code, caught.value.retryable) == ("engine_dead", True)
        assert (engine.ready, engine.alive, engine.resident) == (False, True, set())
        with pytest.raises(EngineStopped):
            engine.stream(submit("hi"))
        with pytest.raises(EngineStopped):
            await engine.load(SECOND, "/image")

        await until(lambda: engine.ready)
        assert (engine.restarts, engine.failure, ready_before) == (1, None, [False])
        await until(lambda: core.warmed == 1)
        assert await text_of(engine.stream(submit("hi", "c", FIRST))) == "TASK*1:hi"

    async def test_what_waits_for_an_adapter_fails_with_the_engine(
        self, engine, core, monkeypatch
    ) -> None:
        await engine.load(SECOND, "/image")
        core.paused = True
        engine.stream(submit("hi", "a", SECOND))
        monkeypatch.setattr(core, "begin_load", lambda image, *, pin: None)  # and no word of it
        waiting = [
            asyncio.create_task(engine.load(FIRST, "/image")),
            asyncio.create_task(engine.unload(SECOND)),
        ]
        await until(lambda: core.leaving == {SECOND})

        engine.stream(submit("crash", "b"))
        core.paused = False

        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineStopped, EngineStopped]

    async def test_adapters_that_do_not_come_back_do_not_keep_the_rest(
        self, engine, caplog
    ) -> None:
        async def fail() -> None:
            raise PoolExhausted("no room")

        engine.on_ready = fail
        engine.stream(submit("crash"))
        await until(lambda: engine.restarts == 1 and engine.ready)
        assert await text_of(engine.stream(submit("hi", "b"))) == "hi"
        assert "not every adapter is back" in caplog.text


class Refusing:
    """Starts engines that refuse their model."""

    def __init__(self, folder: Path) -> None:
        self._ready = ready_message(folder)

    def __call__(self, address: str) -> EngineThread:
        return RefusingThread(ScriptedCore(), self._ready, address)


class RefusingThread(EngineThread):
    def _serve(self, channel) -> None:
        raise ModelRefused("its attention ignores the hook")

"""Clients that go away, read too slowly or ask too much, and an engine that dies under them."""

from __future__ import annotations

import asyncio
import logging
import socket

import httpx
import pytest

from oneplusn.errors import EngineStopped, ModelRefused, QueueFull, RequestCancelled
from oneplusn.server.app import create_app
from oneplusn.server.bridge import MAX_BUFFERED, AsyncEngine, ModelInfo
from oneplusn.server.messages import Sampling, Submit
from oneplusn.server.metrics import Metrics
from oneplusn.server.settings import Settings
from serving import ScriptedCore, serving, wait_until

ENDLESS = {"task": None, "inputs": "endless", "parameters": {"ignore_eos": True}}


@pytest.fixture
def own(adapter_folders, tmp_path):
    """A server of the test's own, whose engine it may stop or break."""
    with serving(Settings(model="tiny-base", adapter=adapter_folders), tmp_path) as running:
        yield running


class TestDisconnect:
    @pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
    def test_a_client_that_leaves_frees_its_sequence(self, own, path) -> None:
        own.core.paused = True
        with socket.create_connection(own.url.removeprefix("http://").split(":")) as client:
            client.sendall(request_bytes(path))
            wait_until(lambda: bool(own.core.submitted))

        assert own.core.cancelled_once.wait(10)
        assert own.core.cancelled == [own.core.submitted[0].id]

    def test_one_that_leaves_within_a_stream_does_too(self, own) -> None:
        with httpx.stream("POST", f"{own.url}/generate_stream", json=ENDLESS) as answer:
            next(answer.iter_lines())

        assert own.core.cancelled_once.wait(10)
        wait_until(lambda: b"oneplusn_client_disconnects_total 1.0" in own.server.metrics.scrape())

    def test_all_choices_are_cancelled(self, own) -> None:
        own.core.paused = True
        body = {"model": "add", "messages": [{"role": "user", "content": "x"}], "n": 4}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{own.url}/v1/chat/completions", json=body, timeout=0.3)

        wait_until(lambda: len(own.core.cancelled) == 4)

    def test_the_gauges_come_down_with_the_last_request(self, own) -> None:
        with httpx.stream("POST", f"{own.url}/generate_stream", json=ENDLESS) as answer:
            next(answer.iter_lines())
            wait_until(lambda: b"num_requests_running 1.0" in own.server.metrics.scrape())

        wait_until(lambda: b"num_requests_running 0.0" in own.server.metrics.scrape())


def request_bytes(path: str) -> bytes:
    request = httpx.Request("POST", f"http://localhost{path}", json=ENDLESS)
    lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items()), "", ""]
    return "\r\n".join(lines).encode() + request.content


class TestEngineDeath:
    def test_what_is_in_flight_fails_and_ready_says_so(self, own) -> None:
        logging.getLogger("oneplusn.engine").disabled = True
        with httpx.stream("POST", f"{own.url}/generate_stream", json=ENDLESS) as stream:
            lines = stream.iter_lines()
            next(lines)

            crashed = httpx.post(f"{own.url}/generate", json={"task": None, "inputs": "crash"})
            rest = "".join(lines)
        logging.getLogger("oneplusn.engine").disabled = False

        assert crashed.status_code == 503
        assert crashed.json()["error"]["code"] == "engine_stopped"
        assert '"code":"engine_stopped"' in rest
        for path in ("/health/ready", "/health/live"):
            assert httpx.get(own.url + path).status_code == 503
        later = httpx.post(f"{own.url}/generate", json={"task": None, "inputs": "hi"})
        assert later.status_code == 503
        assert later.headers["retry-after"]
        assert httpx.get(f"{own.url}/metrics").status_code == 200


def test_a_full_queue_is_429(adapter_folders, tmp_path) -> None:
    core = ScriptedCore(paused=True)
    with serving(Settings(model="tiny-base", max_queue=2), tmp_path, core) as own:
        answer = httpx.post(f"{own.url}/generate", json={"task": None, "inputs": ["a", "b", "c"]})

        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.headers["retry-after"] == "1"
        wait_until(lambda: sorted(core.cancelled) == sorted(s.id for s in core.submitted))


def test_a_model_that_is_refused_ends_the_start(tmp_path) -> None:
    def refuse():
        raise ModelRefused("its attention ignores the hook")

    async def start_and_stop() -> BaseException:
        failed = asyncio.get_running_loop().create_future()
        app = create_app(Settings(model="tiny-base"), refuse, on_failure=failed.set_result)
        async with app.router.lifespan_context(app):
            return await failed

    assert str(asyncio.run(start_and_stop())) == "its attention ignores the hook"


class TestBridge:
    """The engine's thread, without HTTP around it."""

    @pytest.fixture
    def core(self) -> ScriptedCore:
        return ScriptedCore(step_seconds=0)

    @pytest.fixture
    async def engine(self, core, tmp_path):
        engine = AsyncEngine(lambda: (core, ModelInfo(tmp_path, 100)), Metrics(), max_queue=3)
        await engine.start()
        yield engine
        await engine.close()

    @pytest.mark.anyio
    async def test_a_stream_yields_every_token(self, engine) -> None:
        stream = engine.stream(submit("hi"))
        outputs = [output async for output in stream]
        assert [output.token for output in outputs] == [*b"hi", 257]
        assert stream.first is not None
        assert stream.submitted <= stream.first <= stream.last

    @pytest.mark.anyio
    async def test_nothing_is_accepted_before_the_start(self, core, tmp_path) -> None:
        engine = AsyncEngine(lambda: (core, ModelInfo(tmp_path, 100)), Metrics(), max_queue=1)
        with pytest.raises(EngineStopped, match="loading"):
            engine.stream(submit("hi"))

    @pytest.mark.anyio
    async def test_the_queue_has_an_end(self, engine, core) -> None:
        core.paused = True
        for name in "abc":
            engine.stream(submit("hi", name))
        with pytest.raises(QueueFull):
            engine.stream(submit("hi", "d"))

    @pytest.mark.anyio
    async def test_a_reader_that_is_too_slow_is_cancelled(self, engine, core) -> None:
        stream = engine.stream(submit("endless", max_tokens=10 * MAX_BUFFERED))

        await asyncio.to_thread(core.cancelled_once.wait, 10)

        with pytest.raises(RequestCancelled, match="read the stream faster"):
            await anext(stream)

    @pytest.mark.anyio
    async def test_closing_ends_what_is_in_flight(self, engine, core) -> None:
        core.paused = True
        stream = engine.stream(submit("hi"))
        await engine.close()
        with pytest.raises(EngineStopped, match="shutting down"):
            await anext(stream)

    @pytest.mark.anyio
    async def test_a_loop_that_stalls_does_not_stop_the_engine(self, engine, core) -> None:
        """The engine's thread computes to the end while nobody runs on the loop."""
        stream = engine.stream(submit("x" * 90))
        wait_until(lambda: core.submitted != [] and not core.requests)
        assert len([output async for output in stream]) == 91


def submit(text: str, name: str = "id", max_tokens: int = 1000) -> Submit:
    return Submit(name, list(text.encode()), (), Sampling(max_tokens=max_tokens))

"""Signals, deaths and hangs: real processes and sockets, and an engine that follows a script."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from server_processes import KEYS, Process, Streams, error_of, is_running, running
from serving import wait_until

pytestmark = pytest.mark.e2e

Serve = Callable[..., AbstractContextManager[Process]]


@pytest.fixture
def serve(tmp_path) -> Serve:
    def start(**settings: object) -> AbstractContextManager[Process]:
        given = {"model": str(tmp_path / "model"), "port": 0, **settings}
        return running(["scripted_server", json.dumps(given)], tmp_path / "log")

    return start


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def body(tokens: int) -> dict[str, object]:
    """A request that takes 5 ms a token."""
    parameters = {"max_new_tokens": tokens, "ignore_eos": True}
    return {"task": None, "inputs": "endless", "parameters": parameters}


def test_a_death_ends_every_request_at_once_and_the_service_comes_back(serve, pool) -> None:
    with serve() as server:
        engine = server.engine
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine, number)  # the server's business, as when they go to a whole group
        streams = Streams(pool, server.url, [body(240)] * 8)
        unary = pool.submit(httpx.post, f"{server.url}/generate", json=body(240))

        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()

        events, ended = streams.ends()
        assert ended - killed < 1
        assert [error_of(event) for event in events] == [("engine_dead", KEYS)] * 8
        answer = unary.result()
        assert (answer.status_code, error_of(answer.json())) == (503, ("engine_dead", KEYS))
        assert server.http.get("/health/live").status_code == 200
        server.wait_until_ready()
        assert server.engine != engine
        assert server.http.post("/generate", json=body(3)).json()["generated_text"] == "xxx"

        engine = server.engine
        server.popen.kill()
        wait_until(lambda: not is_running(engine), seconds=2)


def test_the_engine_gets_none_of_the_servers_environment(serve) -> None:
    with serve() as server:
        assert b"ONEPLUSN_" in Path(f"/proc/{server.popen.pid}/environ").read_bytes()
        assert b"ONEPLUSN_" not in Path(f"/proc/{server.engine}/environ").read_bytes()


def test_a_hang_is_a_death(serve, pool) -> None:
    with serve(step_timeout=0.5) as server:
        streams = Streams(pool, server.url, [body(240)] * 2)
        engine = server.engine

        os.kill(engine, signal.SIGSTOP)
        stopped = time.monotonic()

        events, ended = streams.ends()
        assert ended - stopped < 0.5 + 1
        assert [error_of(event) for event in events] == [("engine_dead", KEYS)] * 2
        server.wait_until_ready()
        assert not is_running(engine)

        engine = server.engine
        os.kill(engine, signal.SIGSTOP)
        server.popen.kill()
        wait_until(lambda: not is_running(engine), seconds=2)


def test_sigterm_lets_streams_finish_and_takes_the_engine_along(serve, pool) -> None:
    with serve() as server:
        streams = Streams(pool, server.url, [body(200)] * 2)
        engine = server.engine

        server.popen.terminate()
        wait_until(lambda: not server.is_ready(), seconds=0.5)

        answer = httpx.post(f"{server.url}/generate", json=body(1))
        assert (answer.status_code, error_of(answer.json())) == (503, ("draining", KEYS))
        events, _ = streams.ends()
        assert [event["details"]["generated_tokens"] for event in events] == [200, 200]
        assert server.popen.wait(timeout=10) == 0
        assert not is_running(engine)
    assert "Traceback" not in server.log.read_text()

"""How many connections there may be; beyond that only probes are answered, and then nobody."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from oneplusn.server.connection import RESERVED
from oneplusn.server.host import allow_files
from oneplusn.server.settings import Settings
from serving import Live, serving, wait_until

LIMIT = 3


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Iterator[Live]:
    settings = Settings(model="tiny-base", max_connections=LIMIT)
    with serving(settings, tmp_path_factory.mktemp("model")) as running:
        yield running


@pytest.fixture
def crowd(live) -> Iterator[ExitStack]:
    """As many connections as there may be; afterwards none is left."""
    with ExitStack() as connections:
        for _ in range(LIMIT):
            connections.enter_context(connect(live))
        yield connections
    wait_until(lambda: not live.uvicorn.server_state.connections)


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def scraped(live: Live, line: str) -> bool:
    return f"oneplusn_{line}\n".encode() in live.server.metrics.scrape()


@pytest.mark.usefixtures("crowd")
class TestOneMore:
    def test_it_is_told_to_come_back(self, live) -> None:
        answer = httpx.post(f"{live.url}/generate", json={"task": None, "inputs": "hello"})

        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", "too_many_connections")
        assert str(LIMIT) in error["message"]
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["connection"] == "close"
        assert answer.headers["x-request-id"]
        assert not live.core.submitted
        assert scraped(live, 'queue_rejected_total{reason="connections"} 1.0')

    @pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/ping"])
    def test_health_is_answered(self, live, path) -> None:
        assert httpx.get(live.url + path).status_code == 200

    def test_metrics_are_answered(self, live) -> None:
        assert f"oneplusn_http_connections {LIMIT + 1}.0\n" in httpx.get(f"{live.url}/metrics").text

    def test_those_before_it_are_served(self, live, crowd) -> None:
        crowd.pop_all().close()
        with httpx.Client(base_url=live.url) as first:
            wait_until(lambda: first.get("/v1/models").status_code == 200)
            with ExitStack() as others:
                for _ in range(LIMIT):
                    others.enter_context(connect(live))
                assert httpx.get(f"{live.url}/v1/models").status_code == 503
                assert first.get("/v1/models").status_code == 200


def test_beyond_the_reserve_nobody_is_answered(live, crowd) -> None:
    for _ in range(RESERVED):
        crowd.enter_context(connect(live))
    with connect(live) as unlucky:
        assert unlucky.recv(1) == b""
    assert len(live.uvicorn.server_state.connections) == LIMIT + RESERVED


def test_who_leaves_makes_room(live, crowd) -> None:
    assert httpx.get(f"{live.url}/v1/models").status_code == 503
    crowd.pop_all().close()
    wait_until(lambda: not live.uvicorn.server_state.connections)
    assert httpx.get(f"{live.url}/v1/models").status_code == 200


def test_the_number_of_open_files_is_raised_as_far_as_it_may(monkeypatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    seen = [(allow_files(wanted), limits[resource.RLIMIT_NOFILE]) for wanted in (1000, 2000, 5000)]
    assert seen == [(1024, (1024, 4096)), (2000, (2000, 4096)), (4096, (4096, 4096))]


def test_where_there_is_no_limit_none_is_made(monkeypatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (1024, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    assert allow_files(5000) == 5000
    assert limits[resource.RLIMIT_NOFILE] == (5000, resource.RLIM_INFINITY)

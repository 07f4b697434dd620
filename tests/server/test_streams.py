"""Clients that go away, read too slowly or ask too much, and an engine that dies under them."""

from __future__ import annotations

import socket
from typing import ClassVar

import httpx
import pytest

from oneplusn.server import supervisor
from oneplusn.server.messages import FromEngine, StepOutputs
from oneplusn.server.settings import Settings
from serving import Live, ScriptedCore, serving, wait_until

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
        counted = b'oneplusn_client_disconnects_total{phase="streaming"} 1'
        wait_until(lambda: counted in own.server.metrics.scrape())

    def test_all_choices_are_cancelled(self, own) -> None:
        own.core.paused = True
        body = {"model": "add", "messages": [{"role": "user", "content": "x"}], "n": 4}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{own.url}/v1/chat/completions", json=body, timeout=0.3)

        wait_until(lambda: len(own.core.cancelled) == 4)

    def test_the_gauges_come_down_with_the_last_request(self, own) -> None:
        own.core.step_seconds = 0.02  # so that it does not end before anybody looks
        with httpx.stream("POST", f"{own.url}/generate_stream", json=ENDLESS) as answer:
            next(answer.iter_lines())
            wait_until(lambda: b"num_requests_running 1.0" in own.server.metrics.scrape())

        wait_until(lambda: b"num_requests_running 0.0" in own.server.metrics.scrape())


class TestWrites:
    """What a step brings goes through the process in one piece."""

    BODY: ClassVar = {"model": "tiny-base", "prompt": ["abcdefgh"] * 2, "n": 4, "stream": True}

    def test_all_choices_of_a_request_share_one_write_a_step(self, own) -> None:
        own.core.together = 8
        events = written(own, "/v1/completions", self.BODY)
        assert sum(map(len, events)) == 8 * 9 + 1  # every token of every choice, and the end
        assert len(events) <= own.core.steps + 1
        assert max(map(len, events)) >= 8

    def test_all_sequences_of_a_step_share_one_message(self, own, monkeypatch) -> None:
        received = []
        receive = own.server.engine.receive

        def count(message: FromEngine) -> None:
            if isinstance(message, StepOutputs) and message.outputs:
                received.append(len(message.outputs))
            receive(message)

        monkeypatch.setattr(own.server.engine, "receive", count)
        own.core.together = 8
        written(own, "/v1/completions", self.BODY)
        assert received == [8] * 9
        assert own.core.steps == 9


def written(own: Live, path: str, body: object) -> list[list[bytes]]:
    """Ask for a stream; return its events as they were put into chunks, a list for each."""
    with socket.create_connection(own.url.removeprefix("http://").split(":")) as client:
        client.sendall(posted(path, body))
        _, _, rest = client.makefile("rb").read().partition(b"\r\n\r\n")
    chunks = []
    while (size := int((line := rest.partition(b"\r\n"))[0], 16)) > 0:
        chunks.append(line[2][:size].split(b"\n\n")[:-1])
        rest = line[2][size + 2 :]
    return chunks


def request_bytes(path: str, **parameters: int) -> bytes:
    return posted(path, {**ENDLESS, "parameters": {"ignore_eos": True, **parameters}})


def posted(path: str, body: object) -> bytes:
    headers = {"connection": "close"}
    request = httpx.Request("POST", f"http://localhost{path}", json=body, headers=headers)
    lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items()), "", ""]
    return "\r\n".join(lines).encode() + request.content


class TestEngineDeath:
    def test_what_is_in_flight_fails_and_the_service_comes_back(self, own) -> None:
        before = ask(own, "upper", "hi")
        with httpx.stream("POST", f"{own.url}/generate_stream", json=ENDLESS) as stream:
            lines = stream.iter_lines()
            next(lines)

            crashed = ask(own, None, "crash")
            rest = "".join(lines)

        assert (crashed.status_code, crashed.json()["error"]["code"]) == (503, "engine_dead")
        assert crashed.headers["retry-after"] == "1"
        assert "x-should-retry" not in crashed.headers
        assert '"code":"engine_dead"' in rest
        assert "[DONE]" not in rest
        meanwhile = ask(own, "upper", "hi")
        assert (meanwhile.status_code, meanwhile.json()["error"]["code"]) == (503, "engine_dead")
        statuses = {p: httpx.get(f"{own.url}/health/{p}").status_code for p in ("ready", "live")}
        assert statuses == {"ready": 503, "live": 200}
        wait_until(lambda: own.server.ready)
        after = ask(own, "upper", "hi")
        assert (after.status_code, after.json()["generated_text"]) == (200, "UPPER*1:hi")
        assert after.headers["x-oneplusn-adapter"] == before.headers["x-oneplusn-adapter"]
        assert own.server.engine.restarts == 1

    def test_once_nothing_helps_but_a_restart_clients_are_told_not_to_repeat(
        self, own, monkeypatch
    ) -> None:
        monkeypatch.setattr(supervisor, "MAX_FAILURES", 1)

        crashed = ask(own, None, "crash")
        later = ask(own, None, "hi")

        for answer in (crashed, later):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, "engine_dead")
            assert (error["type"], answer.headers["x-should-retry"]) == ("server_error", "false")
            assert "retry-after" not in answer.headers
        assert httpx.get(f"{own.url}/health/live").status_code == 503


def ask(own: Live, task: str | None, text: str) -> httpx.Response:
    return httpx.post(f"{own.url}/generate", json={"task": task, "inputs": text})


def test_a_client_that_does_not_read_is_cut_and_the_others_are_not(tmp_path) -> None:
    core = ScriptedCore(step_seconds=0)
    with serving(Settings(model="tiny-base"), tmp_path, core, context=100_000) as own:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = own.url.removeprefix("http://").split(":")
            client.connect((host, int(port)))
            client.sendall(request_bytes("/generate_stream", max_new_tokens=90_000))
            wait_until(lambda: bool(core.submitted))
            while not core.cancelled_once.is_set():
                assert ask(own, None, "hi").json()["generated_text"] == "hi"
        assert core.cancelled == [core.submitted[0].id]


def test_a_full_queue_is_429(adapter_folders, tmp_path) -> None:
    core = ScriptedCore(paused=True)
    with serving(Settings(model="tiny-base", max_queue=2), tmp_path, core) as own:
        answer = httpx.post(f"{own.url}/generate", json={"task": None, "inputs": ["a", "b", "c"]})

        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.headers["retry-after"] == "1"
        wait_until(lambda: sorted(core.cancelled) == sorted(s.id for s in core.submitted))

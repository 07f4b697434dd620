"""Clients that send or read too slowly: each is cut within its time, and frees what it holds."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse

import httpx
import pytest

from oneplusn.server.settings import Settings
from serving import Live, ScriptedCore, serving, wait_until

SECONDS = 0.5
"""The deadlines of the server under test."""
PATIENCE_S = 20.0
"""What the test waits for them; a server without any fails here."""
KEYS = {"message", "type", "param", "code"}
HEAD = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Iterator[Live]:
    times = {"header_timeout": SECONDS, "body_timeout": SECONDS, "write_timeout": SECONDS}
    core = ScriptedCore(step_seconds=0)
    folder = tmp_path_factory.mktemp("model")
    with serving(Settings(model="tiny-base", **times), folder, core, context=1_000_000) as running:
        yield running


@pytest.fixture
def client(live) -> Iterator[socket.socket]:
    with connect(live) as connected:
        yield connected


def connect(live: Live, *, buffer: int | None = None) -> socket.socket:
    """Open a connection; a small receive buffer lets a reader that sleeps be noticed soon."""
    client = socket.socket()
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.settimeout(PATIENCE_S)
    host, port = live.url.removeprefix("http://").split(":")
    client.connect((host, int(port)))
    return client


def last_answer(client: socket.socket) -> tuple[int, dict]:
    """Read to the end of the connection; return the status and the body of the only answer."""
    head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)


def first_status(client: socket.socket) -> int:
    """Read one answer and no byte more; return its status."""
    with HTTPResponse(client) as answer:
        answer.begin()
        answer.read()
        return answer.status


def counted(live: Live, line: str) -> bool:
    return f"oneplusn_{line} 1.0\n".encode() in live.server.metrics.scrape()


def seconds_to_drip(client: socket.socket, data: bytes) -> float:
    """Send a byte now and then, several within every deadline, until the server has enough."""
    began = time.monotonic()
    client.settimeout(SECONDS / 5)
    for byte in data:
        try:
            client.sendall(bytes([byte]))
            client.recv(1)
        except TimeoutError:
            continue
        except ConnectionError:
            break
        break
    return time.monotonic() - began


class TestHeaders:
    def test_a_head_that_does_not_end_is_answered_by_408(self, client, live) -> None:
        client.sendall(HEAD)

        status, body = last_answer(client)

        assert (status, body.keys(), body["error"].keys()) == (408, {"error"}, KEYS)
        assert (body["error"]["type"], body["error"]["code"]) == (
            "timeout_error",
            "request_timeout",
        )
        assert f"{SECONDS:g} s" in body["error"]["message"]
        assert counted(
            live, 'requests_total{route="unmatched",status="408",code="request_timeout"}'
        )

    def test_bytes_that_trickle_in_win_no_time(self, client) -> None:
        assert SECONDS / 2 < seconds_to_drip(client, HEAD) < 5 * SECONDS

    def test_a_connection_that_says_nothing_is_closed_without_a_word(self, client) -> None:
        assert client.recv(1) == b""

    def test_it_is_the_same_for_the_next_request_of_a_connection(self, client, live) -> None:
        client.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert first_status(client) == 200
        client.sendall(b"GET /health/live HTTP/1.1\r\n")
        assert last_answer(client)[0] == 408

    def test_what_comes_after_an_early_answer_holds_nothing_either(self, client) -> None:
        """The answer is there before the body; who goes on sending is not waited for."""
        client.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n\r\n")
        assert first_status(client) == 404
        assert SECONDS / 2 < seconds_to_drip(client, b"x" * 1000) < 5 * SECONDS

    def test_an_early_answer_can_be_read_after_the_rest_of_a_large_body(self, client) -> None:
        """As clients do that send everything first; the key may have been wrong, for example."""
        began, chunk, left = time.monotonic(), 512, 1 << 16
        head = f"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: {left}\r\n\r\n"
        client.sendall(head.encode())
        while time.monotonic() - began < 3 * SECONDS:
            client.sendall(b"x" * chunk)
            left -= chunk
            time.sleep(SECONDS / 5)
        client.sendall(b"x" * left)
        assert first_status(client) == 404

    def test_one_that_takes_less_is_served(self, client) -> None:
        for line in (b"GET /health/live HTTP/1.1\r\n", b"host: localhost\r\n"):
            client.sendall(line)
            time.sleep(SECONDS / 4)
        client.sendall(b"connection: close\r\n\r\n")
        assert first_status(client) == 200

    def test_what_is_no_http_is_answered_in_the_one_form(self, client) -> None:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, body = last_answer(client)
        assert (status, body["error"]["code"]) == (400, "invalid_value")


class TestBodies:
    def test_one_that_stops_is_answered_by_408(self, client) -> None:
        client.sendall(HEAD + b'content-length: 100\r\n\r\n{"task": nu')
        status, body = last_answer(client)
        assert (status, body["error"].keys()) == (408, KEYS)
        assert body["error"]["code"] == "request_timeout"

    def test_bytes_that_trickle_in_win_no_time(self, client) -> None:
        client.sendall(HEAD + b"content-length: 100000\r\n\r\n")
        assert SECONDS / 2 < seconds_to_drip(client, b" " * 1000) < 5 * SECONDS

    def test_an_upload_may_take_many_times_as_long_while_it_goes_on(self, live) -> None:
        began = time.monotonic()

        def slowly() -> Iterator[bytes]:
            yield b'{"task": null, "inputs": "hi"'
            while time.monotonic() - began < 4 * SECONDS:
                yield b" " * 512  # well above 1 KiB/s
                time.sleep(SECONDS / 5)
            yield b"}"

        answer = httpx.post(
            f"{live.url}/generate", content=slowly(), headers={"content-type": "application/json"}
        )
        assert (answer.status_code, answer.json()["generated_text"]) == (200, "hi")

    def test_an_upload_that_stops_leaves_nothing_and_is_counted(self, client, live) -> None:
        incoming = live.server.data / "incoming"
        head = b"POST /v1/adapters HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n"
        form = b"content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: "
        client.sendall(head + form + b'form-data; name="files"; filename="x"\r\n\r\nabc')
        assert last_answer(client)[1]["error"]["code"] == "request_timeout"
        assert not incoming.exists() or not list(incoming.iterdir())
        assert counted(live, 'registry_uploads_total{result="refused",reason="request_timeout"}')

    def test_waiting_for_an_answer_is_not_sending_slowly(self, live) -> None:
        live.core.paused = True
        try:
            with pytest.raises(httpx.ReadTimeout):
                ask(live, timeout=4 * SECONDS)
        finally:
            live.core.paused = False


def ask(live: Live, **how: float) -> httpx.Response:
    return httpx.post(f"{live.url}/generate", json={"task": None, "inputs": "hi"}, **how)


class TestReaders:
    """A client that stops reading, with little room in the buffers on the way to it."""

    @pytest.fixture(autouse=True)
    def little_room(self, live) -> Iterator[None]:
        wait_until(lambda: is_idle(live))
        before = live.listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        live.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield
        live.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, before)

    def test_a_stream_that_nobody_reads_frees_its_sequence_and_ends(self, live) -> None:
        """The engine never waits for it; its task ends with the connection, which ends in time."""
        live.core.cancelled.clear()
        with connect(live, buffer=4096) as client:
            send(client, "/generate_stream", "endless", max_new_tokens=200_000)
            wait_until(lambda: bool(live.core.cancelled), PATIENCE_S)
            assert live.core.requests == {}
            wait_until(lambda: is_idle(live), PATIENCE_S)
        assert live.server.engine.unfinished == 0

    def test_so_does_one_that_the_engine_has_finished(self, live) -> None:
        """Nothing overflows: nothing but the deadline ends what is left."""
        live.core.cancelled.clear()
        live.core.submitted.clear()
        with connect(live, buffer=4096) as client:
            send(client, "/generate_stream", "x" * 300, max_new_tokens=301)
            wait_until(lambda: bool(live.core.submitted), PATIENCE_S)
            wait_until(lambda: live.server.engine.unfinished == 0, PATIENCE_S)
            wait_until(lambda: is_idle(live), PATIENCE_S)
        assert live.core.cancelled == []

    def test_so_does_an_answer_in_one_piece(self, live) -> None:
        with connect(live, buffer=4096) as client:
            send(client, "/generate", "x" * 100_000, max_new_tokens=1, return_full_text=True)
            wait_until(lambda: not is_idle(live), PATIENCE_S)
            wait_until(lambda: is_idle(live), PATIENCE_S)

    def test_one_that_reads_slowly_gets_all_of_it(self, live) -> None:
        began, size = time.monotonic(), 100_000
        with connect(live, buffer=4096) as client:
            send(client, "/generate", "x" * size, max_new_tokens=1, return_full_text=True)
            received = b""
            while len(received) < size:
                received += client.recv(size // 50)
                time.sleep(3 * SECONDS / 50)
        assert received.startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began > 2 * SECONDS


def is_idle(live: Live) -> bool:
    """Whether nobody is connected, and nothing is answered."""
    state = live.uvicorn.server_state
    return not state.connections and not state.tasks


def send(client: socket.socket, path: str, text: str, **parameters: object) -> None:
    body = json.dumps({"task": None, "inputs": text, "parameters": parameters}).encode()
    head = HEAD.replace(b"/generate", path.encode())
    client.sendall(head + f"content-length: {len(body)}\r\n\r\n".encode() + body)

"""Inputs that no client sends by accident, row by row, and what each is answered with."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from pydantic import ValidationError

from oneplusn.demo.tokenizer import SPECIAL_TOKENS
from oneplusn.server.routes.compat import AbortRequests
from oneplusn.server.routes.tokenize import DetokenizeRequest
from oneplusn.server.schemas_generate import GenerateRequest
from oneplusn.server.schemas_openai import ChatRequest, CompletionRequest
from oneplusn.server.settings import Settings
from serving import CONTEXT, VOCAB, Live, serving

MODEL = "tiny-base"
INT64 = 1 << 63
USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


def error_of(answer: httpx.Response) -> dict[str, str | None]:
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


def raw(live: Live, request: bytes) -> tuple[int, bytes]:
    """Send bytes as they are; return the status and the whole answer."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(request)
        answer = client.makefile("rb").read()
    return int(answer.split(b" ", 2)[1]), answer


class TestHttp:
    @pytest.mark.parametrize(
        "path",
        ["//v1/models", "/v1/../admin", "/v1/%2e%2e/admin", "/v1/models/..%2f..%2fetc", "/v1%00"],
    )
    def test_paths_are_taken_literally(self, live, path) -> None:
        status, answer = raw(live, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert status == 404
        assert b'"code":' in answer

    def test_an_absolute_address_is_no_path(self, live) -> None:
        request = b"GET http://evil.example/v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        assert raw(live, request + b"connection: close\r\n\r\n")[0] == 404

    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("localhost", 200),
            ("LOCALHOST:99", 200),
            ("127.9.9.9", 200),
            ("[::1]:8000", 200),
            ("evil.example", 421),
            ("127.0.0.1.evil.example", 421),
            ("10.0.0.1", 421),
            ("[::2]", 421),
        ],
    )
    def test_without_a_key_only_loopback_names_are_answered(self, http, host, status) -> None:
        answer = http.get("/v1/models", headers={"host": host})
        assert answer.status_code == status
        if status != 200:
            assert error_of(answer)["code"] == "host_not_allowed"

    def test_health_is_answered_whatever_the_host(self, http) -> None:
        assert http.get("/health", headers={"host": "10.0.0.1"}).status_code == 200

    def test_no_other_origin_is_let_in(self, http) -> None:
        asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        answer = http.options("/generate", headers=asked)
        assert answer.status_code == 405
        assert "access-control-allow-origin" not in answer.headers

    @pytest.mark.parametrize(
        "headers",
        [{f"x-{index}": "a" for index in range(101)}, {"x-long": "a" * (64 << 10)}],
        ids=["many", "large"],
    )
    def test_headers_have_a_limit(self, http, headers) -> None:
        answer = http.get("/v1/models", headers=headers)
        assert answer.status_code == 431
        assert error_of(answer)["code"] == "headers_too_large"
        assert answer.headers["x-request-id"]

    @pytest.mark.parametrize(("size", "status"), [(60 << 10, 200), (70 << 10, 431)])
    def test_it_is_the_same_where_they_come_in_pieces(self, live, http, size, status) -> None:
        head = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-long: "
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(head + b"a" * (size - 1024))
            http.get("/health/live")  # by now it has read what came before
            client.sendall(b"a" * 1024 + b"\r\n\r\n")
            answer = client.makefile("rb").read()
        assert int(answer.split(b" ", 2)[1]) == status

    def test_a_body_has_one_length(self, live) -> None:
        body = b"2\r\n{}\r\n0\r\n\r\n"
        lengths = b"content-length: 2\r\ntransfer-encoding: chunked\r\n"
        head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        status, answer = raw(live, head + lengths + b"connection: close\r\n\r\n" + body)
        assert status == 400
        assert b"transfer-encoding" in answer

    def test_compressed_bodies_are_refused(self, http) -> None:
        body = gzip.compress(json.dumps({"task": None, "inputs": "x"}).encode())
        answer = http.post("/generate", content=body, headers={**JSON, "content-encoding": "gzip"})
        assert answer.status_code == 415
        assert error_of(answer)["code"] == "unsupported_media_type"

    @pytest.mark.parametrize("method", ["TRACE", "PATCH", "PROPFIND", "X"])
    def test_unknown_methods(self, http, method) -> None:
        answer = http.request(method, "/generate")
        assert answer.status_code == 405
        assert answer.headers["allow"] == "POST"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[Live]:
    settings = Settings(model=MODEL, max_body=1 << 16)
    with serving(settings, tmp_path_factory.mktemp("small")) as running:
        yield running


class TestSize:
    def test_a_body_in_crumbs_is_counted(self, small) -> None:
        head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        crumbs = b"1\r\n \r\n" * ((1 << 16) + 1) + b"0\r\n\r\n"
        chunked = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        status, answer = raw(small, head + chunked + crumbs)
        assert status == 413
        assert b"payload_too_large" in answer

    def test_a_declared_length_is_believed(self, small) -> None:
        head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        status, _ = raw(small, head + b"content-length: 99999999999\r\n\r\n")
        assert status == 413

    @pytest.mark.parametrize(
        "content",
        [b"[" * 100_000, b'{"a":' * 100_000, json.dumps(dict.fromkeys(map(str, range(100_000))))],
        ids=["lists", "objects", "keys"],
    )
    def test_what_costs_much_to_read(self, http, content) -> None:
        answer = http.post("/generate", content=content, headers=JSON)
        assert answer.status_code == 400


COMPLETION = {"model": MODEL, "prompt": "hi"}
CHAT = {"model": MODEL, "messages": USER}

MANY = 20_000
ITEMS = dict.fromkeys(map(str, range(MANY)), "x")
# Each of many items is wrong. A message about each of a million took minutes and gigabytes.
MUCH_WRONG = [
    ("/v1/completions", CompletionRequest, {**COMPLETION, "prompt": [None] * MANY}),
    ("/v1/completions", CompletionRequest, {**COMPLETION, "prompt": [[None] * MANY] * 3}),
    ("/v1/completions", CompletionRequest, {**COMPLETION, "stop": [5] * MANY}),
    ("/v1/completions", CompletionRequest, {**COMPLETION, "stop_token_ids": ["x"] * MANY}),
    ("/v1/completions", CompletionRequest, {**COMPLETION, "logit_bias": ITEMS}),
    ("/v1/chat/completions", ChatRequest, {**CHAT, "messages": [5] * MANY}),
    (
        "/v1/chat/completions",
        ChatRequest,
        {**CHAT, "messages": [{"role": "user", "content": [5] * MANY}]},
    ),
    ("/v1/chat/completions", ChatRequest, {**CHAT, "chat_template_kwargs": ITEMS}),
    ("/v1/chat/completions", ChatRequest, {**CHAT, "tools": [5] * MANY}),
    ("/v1/chat/completions", ChatRequest, {**CHAT, "structured_outputs": {"choice": [5] * MANY}}),
    ("/v1/chat/completions", ChatRequest, {**CHAT, "oneplusn": {"blend": ITEMS}}),
    ("/generate", GenerateRequest, {"inputs": [5] * MANY}),
    ("/generate", GenerateRequest, {"inputs": "x", "task": ITEMS}),
    ("/generate", GenerateRequest, {"inputs": "x", "task": [5] * MANY}),
    ("/detokenize", DetokenizeRequest, {"tokens": ["x"] * MANY}),
    ("/abort_requests", AbortRequests, {"request_ids": [5] * MANY}),
]


@pytest.mark.parametrize(("path", "model", "body"), MUCH_WRONG, ids=range(len(MUCH_WRONG)))
def test_much_that_is_wrong_is_a_few_mistakes(http, path, model, body) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() < 10

    answer = http.post(path, json=body)

    assert answer.status_code == 400
    assert len(error_of(answer)["message"]) < 300


BAD_FIELDS = [
    ("n", INT64),
    ("n", 0),
    ("n", -1),
    ("n", 1.5),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", INT64),
    ("top_logprobs", 10**6),
    ("top_logprobs", -1),
    ("seed", INT64),
    ("seed", -INT64 - 1),
    ("min_tokens", -1),
    ("min_tokens", 10**6),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("timeout", 0),
    ("timeout", -5),
    ("stop", ""),
    ("stop", ["a"] * 5),
    ("stop", "x" * (1 << 20)),
    ("stop", [""]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [VOCAB]),
    ("stop_token_ids", [0] * 129),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(VOCAB): 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {str(token): 1 for token in range(301)}),
    ("logprobs", 5),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("request_id", "a b"),
    ("request_id", "x" * 129),
    ("cache_salt", "x" * 257),
    ("messages", []),
    ("messages", None),
    ("messages", [{"role": "robot", "content": "hi"}]),
    ("messages", USER * 1001),
    ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {"tokenize": False}),
    ("chat_template_kwargs", {"enable_thinking": "yes"}),
    ("functions", [{}]),
    ("prompt_logprobs", 1),
    ("custom_logit_processor", "gASV"),
    ("oneplusn", {"blend": {}}),
    ("oneplusn", {"blend": {"add": 0}}),
    ("oneplusn", {"return_gates": 1}),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=[f[0] for f in BAD_FIELDS])
def test_fields_out_of_range_name_themselves(http, name, value) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, name: value})

    assert answer.status_code == 400
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(name)


PARTS = [
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "text"},
]


@pytest.mark.parametrize("part", PARTS, ids=[part["type"] for part in PARTS])
def test_only_text_is_read(http, part) -> None:
    messages = [{"role": "user", "content": [part]}]
    answer = http.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    assert answer.status_code == 400
    assert error_of(answer)["param"].startswith("messages.0.content")


def test_an_address_in_a_prompt_is_text(http) -> None:
    url = "file:///etc/passwd"
    answer = http.post("/v1/completions", json={**COMPLETION, "prompt": url})
    assert answer.json()["choices"][0]["text"] == url


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "status", "code"),
        [
            ("", 200, None),
            ("   \n", 200, None),
            ([], 400, "invalid_value"),
            ([[]], 400, "invalid_value"),
            (["a"] * 10_000, 400, "invalid_value"),
            (["a"] * 129, 400, "invalid_value"),
            ([VOCAB], 400, "invalid_value"),
            ([-1], 400, "invalid_value"),
            ([1 << 40], 400, "invalid_value"),
            ([1, "a"], 400, "invalid_value"),
            (None, 400, "invalid_value"),
            ("x" * CONTEXT, 400, "context_length_exceeded"),
            ("x" * 5_000_000, 400, "context_length_exceeded"),
        ],
        ids=lambda value: None if isinstance(value, int) else str(value)[:12],
    )
    def test_odd_ones(self, http, prompt, status, code) -> None:
        answer = http.post("/v1/completions", json={**COMPLETION, "prompt": prompt})
        assert answer.status_code == status
        if code is not None:
            error = error_of(answer)
            assert error["code"] == code
            assert error["param"].startswith("prompt")

    def test_a_long_one_is_refused_before_it_is_encoded(self, http, live, monkeypatch) -> None:
        def encode(*_args: object, **_kwargs: object) -> None:
            pytest.fail("it was encoded")

        monkeypatch.setattr(live.server.inference.tokenizer, "encode", encode)
        answer = http.post("/generate", json={"task": None, "inputs": "x" * 1_000_000})
        assert error_of(answer)["code"] == "context_length_exceeded"

    @pytest.mark.parametrize("content", ["", "  ", None, []])
    def test_empty_messages_are_defined(self, http, content) -> None:
        messages = [{"role": "user", "content": content}]
        answer = http.post("/v1/chat/completions", json={**CHAT, "messages": messages})
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == (content or "")

    @pytest.mark.parametrize("spelled", SPECIAL_TOKENS)
    def test_special_tokens_in_text_are_text(self, http, live, spelled) -> None:
        messages = [{"role": "user", "content": f"a{spelled}b"}]
        http.post("/v1/chat/completions", json={**CHAT, "messages": messages})
        tokens = live.core.submitted[-1].tokens
        assert tokens[:-1] == list(f"a{spelled}b".encode())


NAMES = [
    "../x",
    "a/b",
    "a\x00",
    "x" * 65,
    "x" * 10_000,
    "\u0430dd",  # its first letter is Cyrillic
    ".",
    "-a",
    "A",
    "a,b",
    'a"b',
    "a b",
    "a\n",
    MODEL,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_nothing_may_have(http, name) -> None:
    path = f"/v1/tasks/{quote(name, safe='')}"
    answer = http.put(path, json={"blend": {"add": 1, "upper": 1}})

    assert answer.status_code in (400, 404, 405)
    assert error_of(answer)["type"] == "invalid_request_error"
    names = [entry["name"] for entry in http.get("/v1/tasks").json()["data"]]
    assert names == ["vowels", "upper", "add"]

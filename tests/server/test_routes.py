"""What every route answers, to good requests and to bad ones."""

from __future__ import annotations

import json
import logging

import httpx
import pytest

from oneplusn.server.text import TextStream
from serving import CONTEXT

MODEL = "tiny-base"


def post(http: httpx.Client, path: str, body: object, **options) -> httpx.Response:
    return http.post(path, json=body, **options)


def error_of(answer: httpx.Response) -> dict[str, str | None]:
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


def events_of(answer: httpx.Response) -> list[object]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


class TestGenerate:
    def test_a_task_answers_with_its_version(self, http) -> None:
        answer = post(http, "/generate", {"task": "upper", "inputs": "hi"})

        assert answer.status_code == 200
        body = answer.json()
        assert body["generated_text"] == "UPPER*1:hi"
        assert body["task"] == "upper"
        assert body["adapter"] == "letters@1"
        assert answer.headers["x-oneplusn-adapter"] == "letters@1"
        details = body["details"]
        assert isinstance(details.pop("seed"), int)
        assert details == {
            "finish_reason": "eos_token",
            "prompt_tokens": 3,
            "generated_tokens": 11,
            "cached_tokens": 0,
            "prefill": [],
            "tokens": [],
        }

    @pytest.mark.parametrize("task", [None, MODEL])
    def test_null_and_the_base_name_are_the_base(self, http, task) -> None:
        answer = post(http, "/generate", {"task": task, "inputs": "hi"})

        assert answer.json()["generated_text"] == "hi"
        assert answer.json()["adapter"] is None
        assert answer.json()["task"] is None
        assert "x-oneplusn-adapter" not in answer.headers

    def test_a_list_is_answered_in_order_and_in_one_batch(self, http, live) -> None:
        live.core.together = 4
        tasks = ["upper", None, "add", {"vowels": 0.5, "add": -2}]
        body = {"task": tasks, "inputs": ["a", "b" * 99, "c" * 99, "d"]}
        parameters = {"max_new_tokens": 20}

        answer = post(http, "/generate", {**body, "parameters": parameters})

        texts = [item["generated_text"] for item in answer.json()]
        assert texts == ["UPPER*1:a", "b" * 20, "ADD*1:" + "c" * 14, "VOWELS*0.5+ADD*-2:d"]
        assert [item["task"] for item in answer.json()] == tasks
        assert answer.json()[3]["adapter"] == "letters@1,sums@1"
        assert answer.headers["x-oneplusn-adapter"] == "letters@1,sums@1"
        assert live.core.most_together == 4

    def test_one_task_serves_all_inputs(self, http) -> None:
        answer = post(http, "/generate", {"task": "add", "inputs": ["a", "b"]})
        assert [item["generated_text"] for item in answer.json()] == ["ADD*1:a", "ADD*1:b"]

    def test_parameters_reach_the_engine(self, http, live) -> None:
        wanted = {
            "max_new_tokens": 7,
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.9,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "seed": 42,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [65],
            "logit_bias": {"66": -1.5},
            "unheard_of": True,
        }

        answer = post(http, "/generate", {"task": None, "inputs": "hi", "parameters": wanted})

        sampling = live.core.submitted[-1].sampling
        assert sampling.max_tokens == 7
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.9)
        assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.1, 42)
        assert sampling.ignore_eos is True
        assert sampling.min_tokens == 2
        assert sampling.stop_token_ids == (65,)
        assert sampling.logit_bias == {66: -1.5}
        assert answer.json()["generated_text"] == "hizzzzz"
        assert answer.json()["details"]["finish_reason"] == "length"

    def test_a_stop_string_cuts_the_answer_and_cancels_the_sequence(self, http, live) -> None:
        live.core.cancelled_once.clear()
        parameters = {"stop": ["zzz"], "ignore_eos": True, "return_full_text": True}

        answer = post(http, "/generate", body_of("hello", parameters))

        assert answer.json()["generated_text"] == "hello" + "hello"
        assert answer.json()["details"]["finish_reason"] == "stop_sequence"
        assert live.core.cancelled_once.wait(10)

    def test_a_stop_string_or_token_can_be_kept(self, http) -> None:
        kept = {"include_stop_str_in_output": True}
        text = post(http, "/generate", body_of("hello", {"stop": ["ll"], **kept}))
        token = post(http, "/generate", body_of("hello", {"stop_token_ids": [ord("l")], **kept}))
        plain = post(http, "/generate", body_of("hello", {"stop_token_ids": [ord("l")]}))

        assert text.json()["generated_text"] == "hell"
        assert token.json()["generated_text"] == "hel"
        assert plain.json()["generated_text"] == "he"
        assert plain.json()["details"]["finish_reason"] == "stop_sequence"

    def test_special_tokens_can_be_shown(self, http) -> None:
        shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
        answer = post(http, "/generate", body_of("hi", shown))
        assert answer.json()["generated_text"] == "hi<|end|>"

    @pytest.mark.parametrize(
        ("parameters", "temperature"),
        [
            ({}, 0.0),
            ({"do_sample": False}, 0.0),
            ({"do_sample": True}, 1.0),
            ({"top_p": 0.9}, 1.0),
            ({"top_k": 5, "temperature": 0.3}, 0.3),
        ],
    )
    def test_it_samples_where_that_is_asked_for(self, http, live, parameters, temperature) -> None:
        post(http, "/generate", body_of("hi", parameters))
        assert live.core.submitted[-1].sampling.temperature == temperature

    def test_a_prompt_is_truncated_from_the_left(self, http) -> None:
        # The last token is the one that the tokenizer puts behind every prompt.
        answer = post(http, "/generate", body_of("abcdef", {"truncate": 3}))
        assert answer.json()["generated_text"] == "ef"

    def test_a_request_has_a_deadline(self, http, live) -> None:
        post(http, "/generate", body_of("hi", {"timeout": 2.5}))
        assert 2 < live.core.submitted[-1].timeout <= 2.5

    def test_details_list_the_tokens(self, http) -> None:
        parameters = {"details": True, "top_n_tokens": 2}

        details = post(http, "/generate", body_of("ab", parameters)).json()["details"]

        tokens = details["tokens"]
        assert len(details["top_tokens"]) == 3
        assert [(top["text"], top["logprob"]) for top in details["top_tokens"][0]] == [
            ("a", -98.0),
            ("b", -99.0),
        ]
        assert tokens[0] == {"id": 97, "text": "a", "logprob": -0.5, "special": False}
        assert [token["text"] for token in tokens] == ["a", "b", "<|end|>"]
        assert [token["special"] for token in tokens] == [False, False, True]

    def test_cached_tokens_are_counted(self, http) -> None:
        details = post(http, "/generate", body_of("x" * 40)).json()["details"]
        assert details["cached_tokens"] == 16

    def test_without_a_limit_the_context_is_the_limit(self, http) -> None:
        details = post(http, "/generate", body_of("hi", {"ignore_eos": True})).json()["details"]
        assert details["generated_tokens"] == CONTEXT - 3

    def test_a_stream_ends_with_the_whole(self, http) -> None:
        answer = post(http, "/generate_stream", {"task": "add", "inputs": "1"})

        events = events_of(answer)
        assert [event["index"] for event in events] == list(range(len(events)))
        assert "".join(event["token"]["text"] for event in events) == "ADD*1:1"
        assert [event["generated_text"] for event in events] == [None] * 7 + ["ADD*1:1"]
        assert events[-1]["details"]["finish_reason"] == "eos_token"
        assert answer.headers["x-oneplusn-adapter"] == "sums@1"

    def test_a_failed_request_is_an_error(self, http) -> None:
        answer = post(http, "/generate", body_of("fail"))
        assert answer.status_code == 500
        assert error_of(answer)["message"] == "the model failed on this one"

    def test_a_failure_before_the_first_token_is_no_stream(self, http) -> None:
        answer = post(http, "/generate_stream", body_of("fail"))
        assert answer.status_code == 500
        assert error_of(answer)["type"] == "server_error"


def test_a_fault_of_ours_within_a_stream_is_told(http, monkeypatch) -> None:
    push = TextStream.push
    pushed = list[int]()

    def break_at_the_second(self: TextStream, token: int) -> str:
        pushed.append(token)
        if len(pushed) == 2:
            raise RuntimeError("scripted fault")
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", break_at_the_second)
    monkeypatch.setattr(logging.getLogger("oneplusn.server"), "disabled", True)
    answer = post(http, "/generate_stream", body_of("hello"))
    first, last = events_of(answer)
    assert first["token"]["text"] == "h"
    assert last["error"]["code"] == "internal_error"
    assert "scripted" not in answer.text


def body_of(text: str, parameters: dict[str, object] | None = None) -> dict[str, object]:
    return {"task": None, "inputs": text, "parameters": parameters}


BAD_BODIES = [
    pytest.param({"task": "", "inputs": "x"}, 404, "model_not_found", "task", id="empty-task"),
    pytest.param(
        {"inputs": "x", "model": "add"}, 400, "unsupported_field", "model", id="model-for-task"
    ),
    pytest.param(
        {"inputs": "x", "lora_path": "add"}, 400, "unsupported_field", "lora_path", id="lora-path"
    ),
    pytest.param(
        {"inputs": "x", "parameters": {"task": "add"}},
        400,
        "unsupported_field",
        "parameters.task",
        id="task-in-parameters",
    ),
    pytest.param({"task": "add"}, 400, "missing_field", "inputs", id="no-inputs"),
    pytest.param({"task": "nope", "inputs": "x"}, 404, "model_not_found", "task", id="unknown"),
    pytest.param(
        {"task": {"add": 1, "nope": 1}, "inputs": "x"},
        404,
        "model_not_found",
        "task",
        id="in-blend",
    ),
    pytest.param({"task": {}, "inputs": "x"}, 400, "invalid_value", "task", id="empty-blend"),
    pytest.param(
        {"task": {f"t{i}": 1 for i in range(9)}, "inputs": "x"},
        400,
        "invalid_value",
        "task",
        id="blend-of-nine",
    ),
    pytest.param(
        {"task": {"add": 0}, "inputs": "x"}, 400, "invalid_value", "task.add", id="weight-0"
    ),
    pytest.param(
        {"task": {"add": 1, MODEL: 1}, "inputs": "x"}, 400, "invalid_value", "task", id="base-in-it"
    ),
    pytest.param({"task": 5, "inputs": "x"}, 400, "invalid_value", "task", id="task-number"),
    pytest.param(
        {"task": ["add"], "inputs": ["x", "y"]}, 400, "invalid_value", "task", id="too-few-tasks"
    ),
    pytest.param({"task": ["add"], "inputs": "x"}, 400, "invalid_value", "task", id="list-for-one"),
    pytest.param({"task": None, "inputs": []}, 400, "invalid_value", "inputs", id="no-texts"),
    pytest.param({"task": None, "inputs": 5}, 400, "invalid_value", "inputs", id="number"),
    pytest.param(
        {"task": None, "inputs": "x" * 300},
        400,
        "context_length_exceeded",
        "inputs",
        id="prompt-over-context",
    ),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), BAD_BODIES)
def test_bad_requests_name_the_field(http, body, status, code, param) -> None:
    answer = post(http, "/generate", body)

    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


BAD_PARAMETERS = {
    "max_new_tokens": [0, -1, 1.5, "7", True],
    "temperature": [-0.1, 2.1, "hot"],
    "top_p": [0, 1.1],
    "top_k": [-2],
    "min_p": [-0.1, 1.5],
    "repetition_penalty": [0, -1, 1e-40, 0.009, 101],
    "presence_penalty": [-2.1],
    "seed": [1 << 63, 1.5],
    "stop": [["a"] * 5, "", ["x" * 257], [5]],
    "logit_bias": [{"1": 101}, {str(token): 1 for token in range(301)}, {"a": 1}],
    "stop_token_ids": [[-1], ["a"]],
    "details": ["yes"],
    "timeout": [0, -1, 1e9],
    "truncate": [0],
    "best_of": [2],
    "top_n_tokens": [21],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD_PARAMETERS.items() for value in values],
)
def test_parameters_out_of_range_are_refused(http, name, value) -> None:
    answer = post(http, "/generate", body_of("hi", {name: value}))

    assert answer.status_code == 400
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert name in (error["param"] or "")


RAW_BODIES = [
    pytest.param(b"", 400, id="empty"),
    pytest.param(b"{", 400, id="cut-off"),
    pytest.param(b"[1]", 400, id="no-object"),
    pytest.param(b'"text"', 400, id="string"),
    pytest.param(b'{"task": null, "inputs": "x", "a": NaN}', 400, id="nan"),
    pytest.param(b'{"task": null, "inputs": "x", "a": Infinity}', 400, id="infinity"),
    pytest.param(b'{"task": null, "inputs": "x", "a": 1e999}', 400, id="beyond-a-double"),
    pytest.param(b'{"task": null, "inputs": "\\ud800"}', 400, id="lone-surrogate"),
    pytest.param(b'{"task": null, "inputs": "\xff"}', 400, id="no-utf8"),
    pytest.param(b"[" * 100_000, 400, id="nested"),
    pytest.param(b'{"a": ' + b"1" * 10_000 + b"}", 400, id="long-number"),
    pytest.param(b'{"task": null, "inputs": "x", "inputs": "y"}', 400, id="duplicate-key"),
    pytest.param(b'\xef\xbb\xbf{"task": null, "inputs": "x"}', 400, id="byte-order-mark"),
    pytest.param(b'{"inputs": "' + b"x" * (8 << 20) + b'"}', 413, id="too-large"),
]


@pytest.mark.parametrize(("content", "status"), RAW_BODIES)
def test_bodies_that_are_no_good_json(http, content, status) -> None:
    answer = http.post("/generate", content=content, headers={"content-type": "application/json"})

    assert answer.status_code == status
    assert error_of(answer)["type"] == "invalid_request_error"


def test_a_body_without_a_length_is_counted(http) -> None:
    def chunks():
        for _ in range(80):
            yield b" " * (1 << 17)

    answer = http.post("/generate", content=chunks(), headers={"content-type": "application/json"})

    assert answer.status_code == 413
    assert error_of(answer)["code"] == "payload_too_large"


def test_other_media_types_are_refused(http) -> None:
    answer = http.post("/generate", data={"task": "add", "inputs": "x"})
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "not_found"), ("GET", "/generate", 405, "method_not_allowed")],
)
def test_the_routers_own_errors_have_the_same_shape(http, method, path, status, code) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


class TestRequestId:
    def test_every_answer_has_one(self, http) -> None:
        ids = {
            http.get(path).headers["x-request-id"] for path in ("/health", "/nowhere", "/v1/tasks")
        }
        assert len(ids) == 3

    def test_the_clients_is_kept(self, http) -> None:
        answer = http.get("/health", headers={"x-request-id": "my-id_1"})
        assert answer.headers["x-request-id"] == "my-id_1"

    @pytest.mark.parametrize("given", ["a b", "a.b", "", "x" * 129, "a\x1b[2J", "a,b"])
    def test_a_strange_one_is_replaced(self, http, given) -> None:
        answer = http.get("/health", headers={"x-request-id": given})
        assert answer.headers["x-request-id"] != given


class TestModels:
    def test_the_base_and_every_task_are_listed(self, http) -> None:
        listed = http.get("/v1/models").json()

        assert listed["object"] == "list"
        assert [entry["id"] for entry in listed["data"]] == [MODEL, "vowels", "upper", "add"]
        base, task = listed["data"][:2]
        assert (base["root"], base["parent"], base["max_model_len"]) == (MODEL, None, CONTEXT)
        assert (task["root"], task["parent"], task["adapter"]) == ("letters@1", MODEL, "letters@1")

    def test_one_is_shown(self, http) -> None:
        assert http.get("/v1/models/add").json()["id"] == "add"
        assert http.get(f"/v1/models/{MODEL}").json()["object"] == "model"

    def test_an_unknown_one_is_404(self, http) -> None:
        answer = http.get("/v1/models/org/nope")
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "model_not_found"


def test_tasks_name_their_cluster_and_version(http) -> None:
    first, second, third = http.get("/v1/tasks").json()["data"]

    assert first == {
        "name": "vowels",
        "cluster": "letters",
        "adapter": "letters",
        "version": 1,
        "method": "cgc",
        "description": "the first",
        "defaults": {},
        "blend": None,
    }
    assert (second["name"], second["description"]) == ("upper", "adapter number 0")
    assert (third["name"], third["cluster"], third["method"]) == ("add", "sums", "lora")


@pytest.mark.parametrize(
    "path", ["/health", "/health/live", "/health/ready", "/health/startup", "/ping"]
)
def test_health(http, path) -> None:
    assert http.get(path).status_code == 200

"""OpenAI's npm client: a script asks, and what it printed is looked at here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

NODE = Path(os.environ["ACCEPTANCE_NODE"])
SCRIPT = Path(__file__).with_name("openai_npm.mjs")
PACKAGE = json.loads((NODE / "node_modules/openai/package.json").read_text())

CLIENT = ("openai (npm)", PACKAGE["version"])


@pytest.fixture(scope="module")
def results(server):
    # Read from stdin, a script finds its modules from the folder it is run in.
    done = subprocess.run(
        ["node", "--input-type=module", "-", server.openai_url, server.key],
        input=SCRIPT.read_text(),
        cwd=NODE,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def content(answer) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_models(results) -> None:
    assert len(results["models"]) == 13
    assert {"demo", "sort_numbers", "city"} <= set(results["models"])
    assert results["model"] == "sort_numbers"


def test_chat(results) -> None:
    answer = results["chat"]
    assert content(answer) == ["4 9 31 82"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == 20
    assert answer["model"] == "sort_numbers"


def test_stream_with_usage(results) -> None:
    *chunks, last = results["stream"]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "4 9 31 82"
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 10)


def test_stream_helper(results) -> None:
    assert results["stream_helper"] == "4 9 31 82"


def test_fields(results) -> None:
    assert content(results["limit"]) == ["4 9"]
    assert results["limit"]["choices"][0]["finish_reason"] == "length"
    assert content(results["stop"]) == ["4 9 "]
    assert content(results["choices"]) == ["4 9 31 82"] * 3
    assert content(results["fields"]) == ["4 9 31 82"]


def test_logprobs(results) -> None:
    items = results["logprobs"]["choices"][0]["logprobs"]["content"]
    assert "".join(item["token"] for item in items) == "4 9 31 82"
    assert {len(item["top_logprobs"]) for item in items} == {2}


def test_completions(results) -> None:
    texts = [choice["text"] for choice in results["completions"]["choices"]]
    assert texts == ["4 9 31 82", "5 12 40 61"]


def test_completions_stream_with_usage(results) -> None:
    *chunks, last = results["completions_stream"]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == "4 9 31 82"
    assert last["usage"]["prompt_tokens"] == 10


def test_structured_output(results) -> None:
    assert results["parsed"].keys() == {"name", "side"}
    assert results["parsed"]["side"] in {"north", "south"}
    assert content(results["choice"])[0] in {"heads", "tails"}


def is_weather(arguments) -> bool:
    return arguments.keys() == {"city", "days"} and 1 <= arguments["days"] <= 7


def test_tool_call(results) -> None:
    (choice,) = results["tool_call"]["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert is_weather(json.loads(call["function"]["arguments"]))
    assert is_weather(results["tool_call_parsed"])


def test_tool_call_in_a_stream(results) -> None:
    choice = results["tool_call_streamed"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert is_weather(json.loads(call["function"]["arguments"]))


def test_wrong_key(results) -> None:
    refusal = results["wrong_key"]
    assert (refusal["class"], refusal["status"]) == ("AuthenticationError", 401)
    assert (refusal["code"], refusal["type"]) == ("invalid_api_key", "authentication_error")


@pytest.mark.parametrize(
    ("name", "kind", "status", "code", "param"),
    [
        ("unknown_model", "NotFoundError", 404, "model_not_found", "model"),
        ("unknown_model_streamed", "NotFoundError", 404, "model_not_found", "model"),
        ("bad_parameter", "BadRequestError", 400, "invalid_value", "temperature"),
        ("context", "BadRequestError", 400, "context_length_exceeded", "messages"),
        ("unsupported", "BadRequestError", 400, "unsupported_field", "functions"),
        ("embeddings", "NotFoundError", 404, "not_found", None),
    ],
)
def test_mistakes(results, name, kind, status, code, param) -> None:
    assert results[name] == {
        "class": kind,
        "status": status,
        "code": code,
        "param": param,
        "type": "invalid_request_error",
        "hasId": True,
    }

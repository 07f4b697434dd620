"""Tools and forms of answers over HTTP, with an engine that says what the last message says."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from oneplusn.server.grammars import GrammarSpec
from oneplusn.server.settings import Settings
from serving import Live, serving

MODEL = "tiny-base"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
        },
    }
    for name in ("f", "g")
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
TWO = f'Hi.\n{CALL}\n<tool_call>{{"name": "g", "arguments": {{}}}}</tool_call>'


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Iterator[Live]:
    settings = Settings(model=MODEL, tool_parser="hermes")
    with serving(settings, tmp_path_factory.mktemp("model")) as running:
        yield running


@pytest.fixture(scope="module")
def http(live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def client(live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def say(text: str, **fields) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def chat(http: httpx.Client, text: str, **fields) -> httpx.Response:
    return http.post("/v1/chat/completions", json=say(text, **fields))


def functions(calls) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


class TestCalls:
    def test_an_answer_that_calls_tools(self, http) -> None:
        (choice,) = chat(http, TWO, tools=TOOLS).json()["choices"]

        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] == "Hi."
        assert functions(message["tool_calls"]) == [("f", '{"x": "é"}'), ("g", "{}")]
        assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
        assert len({call["id"] for call in message["tool_calls"]}) == 2

    def test_a_call_alone_has_no_text(self, http) -> None:
        (choice,) = chat(http, CALL, tools=TOOLS, tool_choice="required").json()["choices"]
        assert choice["message"]["content"] is None

    def test_text_alone_has_no_calls(self, http) -> None:
        (choice,) = chat(http, "just text ", tools=TOOLS).json()["choices"]
        assert choice["message"] == {"role": "assistant", "content": "just text ", "refusal": None}
        assert choice["finish_reason"] == "stop"

    def test_a_call_cut_short_keeps_the_reason(self, http) -> None:
        answer = chat(http, CALL, tools=TOOLS, max_tokens=45).json()
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length"
        assert functions(choice["message"]["tool_calls"]) == [("f", '{"x": ')]

    @pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
    def test_without_tools_a_call_is_text(self, http, fields) -> None:
        (choice,) = chat(http, CALL, **fields).json()["choices"]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"

    @pytest.mark.parametrize("text", [TWO, CALL, "just text ", "<tool_call>no call"])
    def test_a_stream_adds_up_to_the_whole_answer(self, http, client, text) -> None:
        (whole,) = chat(http, text, tools=TOOLS, n=1, seed=1).json()["choices"]
        content, calls, reasons = "", {}, []
        stream = client.chat.completions.create(**say(text, tools=TOOLS, stream=True, seed=1))
        for chunk in stream:
            (choice,) = chunk.choices
            content += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(calls)
                    assert call.type == "function"
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""

        message = whole["message"]
        assert content == (message["content"] or "")
        assert [tuple(call) for call in calls.values()] == functions(message.get("tool_calls", []))
        assert reasons[-1] == whole["finish_reason"]
        assert set(reasons[:-1]) == {None}

    def test_openais_client_puts_a_stream_together(self, client) -> None:
        with client.chat.completions.stream(**say(TWO, tools=TOOLS)) as stream:
            for _ in stream:
                pass
            (choice,) = stream.get_final_completion().choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Hi."
        assert [call.function.name for call in choice.message.tool_calls] == ["f", "g"]
        assert choice.message.tool_calls[0].function.arguments == '{"x": "é"}'

    def test_every_choice_has_calls_of_its_own(self, http) -> None:
        choices = chat(http, CALL, tools=TOOLS, n=2).json()["choices"]
        ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
        assert len(ids) == 2

    def test_log_probabilities_come_once_per_token(self, http) -> None:
        body = {"tools": TOOLS, "logprobs": True, "stream": True}
        events = chat(http, "hi", **body).text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
        listed = [chunk["choices"][0].get("logprobs") for chunk in chunks]
        tokens = [item["token"] for entry in listed if entry for item in entry["content"]]
        assert tokens[:2] == ["h", "i"]
        assert len(tokens) == 3

    def test_results_of_tools_are_taken(self, http) -> None:
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "b", "tool_call_id": "c1"},
        ]
        answer = http.post(
            "/v1/chat/completions", json={"model": MODEL, "messages": messages, "tools": TOOLS}
        )
        assert answer.json()["choices"][0]["message"]["content"] == "ab\n"


class TestGrammars:
    @pytest.mark.parametrize(
        ("fields", "kind"),
        [
            ({}, None),
            ({"response_format": {"type": "text"}}, None),
            ({"response_format": {"type": "json_object"}}, "json_schema"),
            ({"structured_outputs": {"regex": "a+"}}, "regex"),
            ({"structured_outputs": {"choice": ["a", "b"]}}, "structural_tag"),
            ({"tools": TOOLS}, "structural_tag"),
            ({"tools": TOOLS, "tool_choice": "none"}, None),
            (
                {
                    "tools": TOOLS,
                    "tool_choice": "none",
                    "response_format": {"type": "json_object"},
                },
                "json_schema",
            ),
            (
                {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
                "structural_tag",
            ),
        ],
    )
    def test_the_engine_gets_the_grammar_of_a_chat(self, http, live, fields, kind) -> None:
        assert chat(http, "hi", n=2, **fields).status_code == 200
        for message in live.core.submitted[-2:]:
            got = message.grammar and GrammarSpec.decode(message.grammar).kind
            assert got == kind

    def test_the_engine_gets_the_grammar_of_a_completion(self, http, live) -> None:
        body = {"model": MODEL, "prompt": ["a", "b"], "structured_outputs": {"regex": "c"}}
        assert http.post("/v1/completions", json=body).status_code == 200
        for message in live.core.submitted[-2:]:
            assert GrammarSpec.decode(message.grammar).text == "c"

    SCHEMA = "response_format.json_schema.schema"

    @pytest.mark.parametrize(
        ("fields", "param", "code"),
        [
            ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "invalid_value"),
            (
                {"structured_outputs": {"grammar": "root ::= x"}},
                "structured_outputs.grammar",
                "invalid_value",
            ),
            ({"structured_outputs": {"json": {"type": 5}}}, "structured_outputs.json", None),
            ({"structured_outputs": {"json": {"pattern": 5, "type": "string"}}}, None, None),
            ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json", None),
            ({"structured_outputs": {"structural_tag": "{}"}}, None, "unsupported_field"),
            ({"guided_json": {"type": "object"}}, "guided_json", "unsupported_field"),
            (
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:1/x"}},
                    }
                },
                SCHEMA,
                "invalid_value",
            ),
            ({"response_format": {"type": "json_schema"}}, SCHEMA, "invalid_value"),
            ({"response_format": {"type": "yaml"}}, None, None),
            ({"tools": TOOLS * 2}, "tools", "invalid_value"),
            ({"tools": TOOLS * 65}, None, None),
            ({"tools": TOOLS, "tool_choice": "sometimes"}, None, None),
            ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
            (
                {
                    "tools": [
                        {
                            "type": "function",
                            "function": {
                                "name": "f",
                                "parameters": {"properties": {"x": {"type": "strng"}}},
                            },
                        }
                    ]
                },
                "tools",
                "invalid_value",
            ),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, None, None),
            ({"tools": [{"type": "retrieval"}]}, None, None),
        ],
    )
    def test_what_cannot_be_held_is_a_400(self, http, fields, param, code) -> None:
        answer = chat(http, "hi", **fields)
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert error["type"] == "invalid_request_error"
        assert param is None or error["param"] == param
        assert code is None or error["code"] == code
        assert chat(http, "hi").status_code == 200


def test_a_model_that_knows_no_tools_says_how_to_give_it_some(tmp_path) -> None:
    with (
        serving(Settings(model=MODEL), tmp_path) as running,
        httpx.Client(base_url=running.url, timeout=30) as http,
    ):
        answer = chat(http, "hi", tools=TOOLS)
        assert answer.status_code == 400
        assert "--tool-parser" in answer.json()["error"]["message"]
        assert chat(http, "hi", tools=TOOLS, tool_choice="none").status_code == 200

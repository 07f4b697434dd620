"""What is written for text-generation-inference and LoRAX: the very bodies of their clients."""

from __future__ import annotations

import json

import httpx
import pytest

from oneplusn.server.grammars import GrammarSpec

MODEL = "tiny-base"


# What the clients `text-generation` 0.7.0 and `lorax-client` 0.6.3 send to the root.
BOTH = {
    "do_sample": False,
    "max_new_tokens": 20,
    "repetition_penalty": None,
    "return_full_text": False,
    "stop": [],
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "best_of": None,
    "watermark": False,
    "details": True,
    "decoder_input_details": False,
}


def tgi(**parameters: object) -> dict[str, object]:
    """Return what text-generation-inference's client sends, with some parameters set."""
    unset = {
        "adapter_id": None,
        "frequency_penalty": None,
        "seed": None,
        "top_n_tokens": None,
        "grammar": None,
    }
    return {"inputs": "hi", "parameters": BOTH | unset | parameters, "stream": False}


LORAX = {
    "inputs": "hi",
    "parameters": {
        **BOTH,
        "adapter_id": "upper",
        "adapter_source": None,
        "merged_adapters": None,
        "api_token": None,
        "ignore_eos_token": False,
        "seed": 7,
        "return_k_alternatives": 1,
        "response_format": None,
    },
    "stream": False,
}


def refusal(answer: httpx.Response) -> tuple[int, str | None]:
    """Return the status of a refusal, and the parameter that it names."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return answer.status_code, error["param"]


class TestTextGenerationInference:
    def test_one_input_is_answered_by_a_list(self, http) -> None:
        (answer,) = http.post("/", json=tgi()).json()
        assert answer["generated_text"] == "hi"
        assert answer["details"].pop("seed") >= -(1 << 63)
        assert answer["details"] == {
            "finish_reason": "eos_token",
            "prompt_tokens": 3,
            "generated_tokens": 3,
            "cached_tokens": 0,
            "prefill": [],
            "tokens": [
                {"id": 104, "text": "h", "logprob": -0.5, "special": False},
                {"id": 105, "text": "i", "logprob": -0.5, "special": False},
                {"id": 257, "text": "<|end|>", "logprob": -0.5, "special": True},
            ],
        }

    def test_its_name_for_the_base(self, http) -> None:
        body = {"model": "tgi", "messages": [{"role": "user", "content": "hi"}]}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == "hi"
        assert answer["oneplusn"] == {"task": None, "adapter": None}
        assert isinstance(answer["system_fingerprint"], str)

    def test_a_stream(self, http) -> None:
        answer = http.post("/", json={**tgi(), "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[5:]) for line in answer.text.splitlines() if line]
        assert [event["token"]["text"] for event in events] == ["h", "i", ""]
        assert [event["index"] for event in events] == [0, 1, 2]
        assert [event["generated_text"] for event in events] == [None, None, "hi"]
        assert events[0]["details"] is None
        assert events[-1]["details"]["finish_reason"] == "eos_token"
        assert events[-1]["details"]["generated_tokens"] == 3

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("typical_p", 0.5),
            ("watermark", True),
            ("decoder_input_details", True),
            ("best_of", 2),
        ],
    )
    def test_what_would_change_the_answer_is_refused(self, http, field, value) -> None:
        answer = http.post("/", json=tgi(**{field: value}))
        assert refusal(answer) == (400, f"parameters.{field}")

    @pytest.mark.parametrize(
        ("field", "value", "kind"),
        [
            ("grammar", {"type": "regex", "value": "[a-z]+"}, "regex"),
            ("grammar", {"type": "json", "value": {"type": "object"}}, "json_schema"),
            ("response_format", {"type": "json_object"}, "json_schema"),
            (
                "response_format",
                {"type": "json_object", "schema": {"type": "object"}},
                "json_schema",
            ),
        ],
    )
    def test_the_form_of_an_answer(self, http, live, field, value, kind) -> None:
        assert http.post("/", json=tgi(**{field: value})).status_code == 200
        assert GrammarSpec.decode(live.core.submitted[-1].grammar).kind == kind

    @pytest.mark.parametrize(
        ("parameters", "param"),
        [
            ({"grammar": {"type": "regex", "value": "("}}, "parameters.grammar.value"),
            ({"grammar": {"type": "regex", "value": {}}}, "parameters.grammar.value"),
            ({"grammar": {"type": "json", "value": "{"}}, "parameters.grammar.value"),
            ({"grammar": {"type": "xml", "value": "a"}}, "parameters.grammar.type"),
            (
                {"response_format": {"type": "json_object", "schema": {"type": "no"}}},
                "parameters.response_format.schema",
            ),
            (
                {
                    "grammar": {"type": "regex", "value": "a"},
                    "response_format": {"type": "json_object"},
                },
                "parameters.grammar",
            ),
        ],
    )
    def test_forms_that_are_none(self, http, parameters, param) -> None:
        answer = http.post("/generate", json={"inputs": "a", "parameters": parameters})
        assert refusal(answer) == (400, param)


class TestLorax:
    def test_an_adapter_id_is_a_task(self, http, live) -> None:
        (answer,) = http.post("/", json=LORAX).json()
        assert answer["generated_text"] == "UPPER*1:hi"
        assert answer["adapter"] == "letters@1"
        assert answer["details"]["seed"] == 7
        (alternative,) = answer["details"]["tokens"][0]["alternative_tokens"]
        assert alternative == {"id": 97, "text": "a", "logprob": -98.0, "special": False}

    @pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
    def test_so_it_is_on_the_other_routes(self, http, path) -> None:
        answer = http.post(path, json=LORAX)
        assert answer.headers["x-oneplusn-adapter"] == "letters@1"

    @pytest.mark.parametrize("adapter", ["", MODEL, None])
    def test_none_is_the_base(self, http, adapter) -> None:
        body = {"inputs": "hi", "parameters": {"adapter_id": adapter}}
        assert http.post("/generate", json=body).json()["adapter"] is None

    def test_end_tokens_can_be_ignored_under_its_name(self, http, live) -> None:
        body = {"inputs": "hi", "parameters": {"ignore_eos_token": True, "max_new_tokens": 5}}
        assert http.post("/generate", json=body).json()["generated_text"] == "hizzz"

    @pytest.mark.parametrize(
        ("parameters", "status", "param"),
        [
            ({"adapter_id": "nope"}, 404, "parameters.adapter_id"),
            ({"adapter_id": "letters"}, 400, "parameters.adapter_id"),
            ({"adapter_id": "org/repo"}, 404, "parameters.adapter_id"),
            ({"adapter_id": "add", "adapter_source": "hub"}, 400, "parameters.adapter_source"),
            ({"adapter_id": "add", "api_token": "hf_x"}, 400, "parameters.api_token"),
            ({"merged_adapters": {"ids": ["add"]}}, 400, "parameters.merged_adapters"),
        ],
    )
    def test_refused(self, http, parameters, status, param) -> None:
        answer = http.post("/generate", json={"inputs": "hi", "parameters": parameters})
        assert refusal(answer) == (status, param)

    def test_task_and_adapter_id_must_agree(self, http) -> None:
        both = {"task": "add", "inputs": "hi", "parameters": {"adapter_id": "add"}}
        assert http.post("/generate", json=both).status_code == 200
        both["parameters"]["adapter_id"] = "upper"
        assert refusal(http.post("/generate", json=both)) == (400, "parameters.adapter_id")

"""Tokens both ways, and what the server says of itself."""

from __future__ import annotations

import pytest

from oneplusn import __version__
from oneplusn.demo.tokenizer import ANSWER_ID
from serving import CONTEXT, VOCAB

MODEL = "tiny-base"


class TestTokenize:
    def test_a_text(self, http) -> None:
        answer = http.post("/tokenize", json={"model": MODEL, "prompt": "hi"})
        assert answer.json() == {
            "count": 3,
            "max_model_len": CONTEXT,
            "tokens": [104, 105, ANSWER_ID],
            "token_strs": None,
        }

    def test_without_special_tokens(self, http) -> None:
        body = {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True}
        answer = http.post("/tokenize", json=body).json()
        assert answer["tokens"] == [104, 105]
        assert answer["token_strs"] == ["h", "i"]

    def test_a_conversation(self, http, live) -> None:
        messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": "hi"}]
        tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
        assert tokens == live.core.submitted[-1].tokens

    @pytest.mark.parametrize(
        ("body", "status", "param"),
        [
            ({}, 400, "prompt"),
            ({"prompt": "a", "messages": []}, 400, "messages"),
            ({"prompt": 5}, 400, "prompt"),
            ({"prompt": "x", "model": "nope"}, 404, "model"),
            ({"prompt": "x" * 100_000}, 400, "prompt"),
            ({"messages": [{"role": "user", "content": "x"}], "chat_template": "{"}, 400, "chat_t"),
            (
                {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False},
                400,
                "add_generation_prompt",
            ),
        ],
    )
    def test_refused(self, http, body, status, param) -> None:
        answer = http.post("/tokenize", json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["param"].startswith(param)


class TestDetokenize:
    def test_back_again(self, http) -> None:
        body = {"model": "add", "tokens": [104, 105, ANSWER_ID]}
        assert http.post("/detokenize", json=body).json() == {"prompt": "hi<|answer|>"}

    def test_nothing(self, http) -> None:
        assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}

    @pytest.mark.parametrize("tokens", [[VOCAB], [-1], ["a"], "a", [1 << 40], None])
    def test_refused(self, http, tokens) -> None:
        answer = http.post("/detokenize", json={"tokens": tokens})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("tokens")


class TestInfo:
    def test_limits_and_what_is_there(self, http) -> None:
        info = http.get("/info").json()
        assert info["model_id"] == MODEL
        assert info["max_model_len"] == info["max_total_tokens"] == CONTEXT
        assert info["max_input_tokens"] == CONTEXT - 1
        assert info["vocab_size"] == VOCAB
        assert (info["num_adapters"], info["num_tasks"]) == (2, 3)
        assert info["num_adapters_resident"] == 2

    def test_it_tells_no_path(self, http, live) -> None:
        for path in ("/info", "/v1/models", "/v1/tasks", "/openapi.json"):
            told = http.get(path).text
            assert str(live.server.data) not in told
            assert "/tmp" not in told

    def test_version(self, http) -> None:
        assert http.get("/version").json() == {"version": __version__}

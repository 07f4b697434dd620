"""OpenAI's own client against a real socket: chat, completions, streams, and its exceptions."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

MODEL = "tiny-base"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


class TestChat:
    def test_a_task_answers(self, client) -> None:
        answer = client.chat.completions.create(model="upper", messages=USER)

        assert answer.object == "chat.completion"
        assert answer.model == "upper"
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", "UPPER*1:hi")
        assert choice.finish_reason == "stop"
        assert choice.logprobs is None
        assert answer.usage.prompt_tokens == 3
        assert answer.usage.completion_tokens == 11
        assert answer.usage.total_tokens == 14
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert answer.model_extra["oneplusn"] == {"task": "upper", "adapter": "letters@1"}

    def test_the_base_answers(self, client) -> None:
        answer = client.chat.completions.create(model=MODEL, messages=USER)
        assert answer.choices[0].message.content == "hi"

    def test_roles_and_parts_become_one_prompt(self, client) -> None:
        messages = [
            {"role": "developer", "content": "be"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ]
        answer = client.chat.completions.create(model=MODEL, messages=messages)
        assert answer.choices[0].message.content == "be\nab"

    def test_several_choices_have_consecutive_seeds(self, client, live) -> None:
        answer = client.chat.completions.create(model="add", messages=USER, n=3, seed=7)

        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [submit.sampling.seed for submit in live.core.submitted[-3:]] == [7, 8, 9]
        assert answer.usage.prompt_tokens == 3
        assert answer.usage.completion_tokens == 3 * len("ADD*1:hi") + 3

    def test_sampling_reaches_the_engine(self, client, live) -> None:
        client.chat.completions.create(
            model="add",
            messages=USER,
            temperature=0.25,
            top_p=0.5,
            presence_penalty=1.5,
            frequency_penalty=-0.5,
            logit_bias={"65": 2},
            max_completion_tokens=5,
            extra_body={"top_k": 4, "min_p": 0.1, "ignore_eos": True, "min_tokens": 1},
        )
        sampling = live.core.submitted[-1].sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.25, 0.5, 5)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5)
        assert (sampling.top_k, sampling.min_p, sampling.min_tokens) == (4, 0.1, 1)
        assert sampling.logit_bias == {65: 2}
        assert sampling.ignore_eos is True

    def test_logprobs(self, client) -> None:
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, logprobs=True, top_logprobs=2
        )
        first = answer.choices[0].logprobs.content[0]
        assert (first.token, first.logprob, first.bytes) == ("h", -0.5, [104])
        assert [(top.token, top.logprob) for top in first.top_logprobs] == [("a", -98), ("b", -99)]

    def test_a_stop_string_ends_the_answer(self, client) -> None:
        answer = client.chat.completions.create(model="add", messages=USER, stop=[":", "?"])
        assert answer.choices[0].message.content == "ADD*1"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].model_extra["stop_reason"] == ":"

    def test_an_end_token_is_no_stop_reason(self, client) -> None:
        answer = client.chat.completions.create(model="add", messages=USER)
        assert answer.choices[0].model_extra["stop_reason"] is None
        stops = {"stop_token_ids": [ord(":")]}
        answer = client.chat.completions.create(model="add", messages=USER, extra_body=stops)
        assert answer.choices[0].message.content == "ADD*1"
        assert answer.choices[0].model_extra["stop_reason"] == ord(":")

    def test_the_limit_ends_the_answer(self, client) -> None:
        answer = client.chat.completions.create(model="add", messages=USER, max_tokens=3)
        assert answer.choices[0].message.content == "ADD"
        assert answer.choices[0].finish_reason == "length"

    def test_a_stream_with_usage(self, client) -> None:
        with client.chat.completions.create(
            model="upper", messages=USER, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)

        assert chunks[0].choices[0].delta.role == "assistant"
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert "".join(deltas) == "UPPER*1:hi"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 11
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert len({chunk.id for chunk in chunks}) == 1

    def test_a_stream_with_usage_all_along(self, client) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        with client.chat.completions.create(
            model="upper", messages=USER, stream=True, stream_options=options
        ) as stream:
            chunks = list(stream)

        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts[0] == 1
        assert counts == sorted(counts)
        assert counts[-1] == 11
        assert all(chunk.usage.prompt_tokens == 3 for chunk in chunks)

    def test_a_stream_of_several_choices(self, client) -> None:
        with client.chat.completions.create(
            model="upper", messages=USER, stream=True, n=2, logprobs=True
        ) as stream:
            chunks = list(stream)

        for index in (0, 1):
            own = [c.choices[0] for c in chunks if c.choices[0].index == index]
            assert "".join(choice.delta.content or "" for choice in own) == "UPPER*1:hi"
            assert own[0].delta.role == "assistant"
            assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
            assert own[1].logprobs.content[0].logprob == -0.5


class TestCompletions:
    def test_one_prompt(self, client) -> None:
        answer = client.completions.create(model="add", prompt="1 2", temperature=0)
        assert answer.object == "text_completion"
        assert answer.choices[0].text == "ADD*1:1 2"

    def test_several_prompts_and_choices_keep_their_order(self, client) -> None:
        answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2)
        assert [choice.text for choice in answer.choices] == ["a", "a", "b", "b"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == 4

    def test_tokens_as_prompts(self, client) -> None:
        one = client.completions.create(model=MODEL, prompt=[104, 105])
        several = client.completions.create(model=MODEL, prompt=[[104, 105], [97]])
        assert one.choices[0].text == "hi"
        assert [choice.text for choice in several.choices] == ["hi", "a"]

    def test_echo(self, client) -> None:
        answer = client.completions.create(model="add", prompt="1", echo=True)
        assert answer.choices[0].text == "1ADD*1:1"

    def test_logprobs(self, client) -> None:
        answer = client.completions.create(model=MODEL, prompt="ab", logprobs=1)
        logprobs = answer.choices[0].logprobs
        assert logprobs.tokens == ["a", "b", ""]
        assert logprobs.token_logprobs == [-0.5] * 3
        assert logprobs.top_logprobs == [{"a": -98.0}] * 3
        assert logprobs.text_offset == [0, 1, 2]

    def test_a_stream(self, client) -> None:
        with client.completions.create(
            model="add",
            prompt=["1", "2"],
            stream=True,
            echo=True,
            stream_options={"include_usage": True},
        ) as stream:
            chunks = list(stream)

        assert chunks[0].object == "text_completion"
        texts = {0: "", 1: ""}
        for chunk in chunks[:-1]:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == {0: "1ADD*1:1", 1: "2ADD*1:2"}
        assert chunks[-1].usage.prompt_tokens == 4

    def test_offsets_in_a_stream_go_on(self, client) -> None:
        with client.completions.create(
            model=MODEL, prompt="abc", stream=True, logprobs=0
        ) as stream:
            offsets = [chunk.choices[0].logprobs.text_offset for chunk in stream]
        assert offsets == [[0], [1], [2], [3]]


class TestExtension:
    def test_a_blend(self, client) -> None:
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, extra_body={"oneplusn": {"blend": {"add": 2, "upper": 0.5}}}
        )
        assert answer.choices[0].message.content == "ADD*2+UPPER*0.5:hi"
        assert answer.model_extra["oneplusn"] == {
            "task": {"add": 2, "upper": 0.5},
            "adapter": "sums@1,letters@1",
        }

    def test_versions_with_their_digests(self, client, live) -> None:
        asked = {"oneplusn": {"return_version": True}}
        answer = client.completions.create(model="add", prompt="1", extra_body=asked)
        (version,) = live.server.registry.versions("sums")
        assert answer.model_extra["oneplusn"]["versions"] == [
            {"adapter": "sums", "version": 1, "digest": version.digest}
        ]

    def test_gates_in_a_stream_are_told_once(self, client) -> None:
        asked = {"oneplusn": {"return_gates": True}}
        with client.chat.completions.create(
            model="upper", messages=USER, stream=True, extra_body=asked
        ) as stream:
            told = [chunk.model_extra["oneplusn"] for chunk in stream]

        (gates,) = told[0]["gates"]
        assert (gates["task"], gates["adapter"], gates["weight"]) == ("upper", "letters@1", 1)
        assert gates["experts"] == ["shared", "own-upper"]
        assert gates["modules"] == {"model.layers.0.self_attn.q_proj": [0.5, 1.0]}
        assert all("gates" not in later for later in told[1:])

    def test_a_request_id_of_the_body(self, client) -> None:
        answer = client.completions.create(model="add", prompt="1", extra_body={"request_id": "a1"})
        assert answer.id == "cmpl-a1"
        raw = client.completions.with_raw_response.create(
            model="add", prompt="1", extra_body={"request_id": "a1"}
        )
        assert raw.headers["x-request-id"] == "a1"

    def test_the_headers_id_comes_first(self, client) -> None:
        raw = client.completions.with_raw_response.create(
            model="add",
            prompt="1",
            extra_body={"request_id": "a1"},
            extra_headers={"x-request-id": "h1"},
        )
        assert raw.headers["x-request-id"] == "h1"
        assert raw.parse().id == "cmpl-h1"

    def test_the_cache_can_be_kept_apart(self, client, live) -> None:
        client.completions.create(model="add", prompt="1", extra_body={"cache_salt": "mine"})
        assert live.core.submitted[-1].salt == "default:mine"

    def test_a_blend_goes_with_the_base(self, client) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(
                model="add", prompt="1", extra_body={"oneplusn": {"blend": {"upper": 1}}}
            )
        assert caught.value.param == "oneplusn.blend"


class TestModels:
    def test_listed(self, client) -> None:
        assert [model.id for model in client.models.list()] == [MODEL, "vowels", "upper", "add"]

    def test_shown(self, client) -> None:
        assert client.models.retrieve("add").owned_by == "oneplusn"


REFUSED = [
    pytest.param({"model": "nope"}, openai.NotFoundError, "model_not_found", "model", id="model"),
    pytest.param({"messages": []}, openai.BadRequestError, "invalid_value", "messages", id="empty"),
    pytest.param({"n": 9}, openai.BadRequestError, "invalid_value", "n", id="n"),
    pytest.param(
        {"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature", id="hot"
    ),
    pytest.param(
        {"top_logprobs": 2}, openai.BadRequestError, "invalid_value", "top_logprobs", id="logprobs"
    ),
    pytest.param(
        {"max_tokens": 300},
        openai.BadRequestError,
        "context_length_exceeded",
        "messages",
        id="context",
    ),
    pytest.param(
        {"max_tokens": 3, "max_completion_tokens": 4},
        openai.BadRequestError,
        "invalid_value",
        "max_completion_tokens",
        id="two-limits",
    ),
    pytest.param(
        {"extra_body": {"task": "upper"}},
        openai.BadRequestError,
        "invalid_value",
        "task",
        id="task",
    ),
    pytest.param(
        {"response_format": {"type": "xml"}},
        openai.BadRequestError,
        "invalid_value",
        "response_format.type",
        id="format",
    ),
    pytest.param(
        {"extra_body": {"oneplusn": {"blend": {"nope": 1}}, "model": MODEL}},
        openai.NotFoundError,
        "model_not_found",
        "oneplusn.blend",
        id="blend",
    ),
    pytest.param(
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        openai.BadRequestError,
        "invalid_value",
        "tools",
        id="tools",
    ),
    pytest.param(
        {"logit_bias": {"5000": 1}},
        openai.BadRequestError,
        "invalid_value",
        "logit_bias",
        id="bias",
    ),
]


@pytest.mark.parametrize(("change", "kind", "code", "param"), REFUSED)
def test_mistakes_are_the_clients_own_exceptions(client, change, kind, code, param) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "add", "messages": USER, **change})

    assert caught.value.type == "invalid_request_error"
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.request_id


def test_a_failure_within_a_stream_is_raised(client) -> None:
    prompt = [{"role": "user", "content": "fail"}]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=prompt, stream=True)


def test_a_deadline_that_passes(live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused") as client:
        endless = [{"role": "user", "content": "endless"}]
        body = {"ignore_eos": True, "timeout": 0.05}
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=endless, extra_body=body)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_task_may_repeat_the_model(client) -> None:
    answer = client.chat.completions.create(
        model="add", messages=USER, extra_body={"task": "add", "unheard_of": 1}
    )
    assert answer.choices[0].message.content == "ADD*1:hi"


@pytest.mark.anyio
async def test_the_asynchronous_client(live) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="unused") as client:
        stream = await client.chat.completions.create(model="add", messages=USER, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "ADD*1:hi"

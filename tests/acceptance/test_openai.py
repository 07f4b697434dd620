"""OpenAI's Python client, which is also how vLLM's fields are sent."""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import version
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

CLIENT = ("openai", version("openai"))

NUMBERS = [{"role": "user", "content": "4 82 9 31"}]
SORT = {"model": "sort_numbers", "messages": NUMBERS, "temperature": 0}
# The demo's model wanders in white space where JSON allows it; its tokens are bytes.
NO_SPACE = {str(byte): -100 for byte in b"\t\n\r "}
FORMED = {"model": "city", "messages": NUMBERS, "temperature": 0, "logit_bias": NO_SPACE}


class City(BaseModel):
    """An answer's form."""

    name: str = Field(max_length=12)
    side: Literal["north", "south"]


class Weather(BaseModel):
    """Tell the weather of a city."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=7)


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {**Weather.model_json_schema(), "additionalProperties": False},
    },
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.openai_url, api_key=server.key, max_retries=0) as made:
        yield made


def text_of(stream) -> str:
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def test_models(client) -> None:
    names = [model.id for model in client.models.list()]
    assert len(names) == 13
    assert {"demo", "sort_numbers", "city"} <= set(names)

    task = client.models.retrieve("sort_numbers")
    assert (task.id, task.object, task.owned_by) == ("sort_numbers", "model", "oneplusn")


def test_chat(client) -> None:
    answer = client.chat.completions.create(**SORT)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "4 9 31 82")
    assert choice.finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", "sort_numbers")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id in answer.id


def test_every_cluster_answers_as_itself(client) -> None:
    record = [{"role": "user", "content": "name=Ada Holm; city=Paris; born=3 May 1950"}]
    words = [{"role": "user", "content": "lemon river ghost"}]
    asked = {"city": record, "iso_date": record, "initials": words, "largest": NUMBERS}
    answers = {
        task: client.chat.completions.create(model=task, messages=messages, temperature=0)
        for task, messages in asked.items()
    }
    assert {task: answer.choices[0].message.content for task, answer in answers.items()} == {
        "city": "Paris",
        "iso_date": "1950-05-03",
        "initials": "lrg",
        "largest": "82",
    }


def test_stream_with_usage(client) -> None:
    wanted = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**SORT, **wanted))
    assert text_of(chunks) == "4 9 31 82"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 10
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


def test_stream_that_counts_all_along(client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = client.chat.completions.create(**SORT, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 10


def test_stream_helper(client) -> None:
    with client.chat.completions.stream(**SORT) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == "4 9 31 82"


def test_asynchronous_client(server) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=server.openai_url, api_key=server.key) as client:
            stream = await client.chat.completions.create(**SORT, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == "4 9 31 82"


def test_completions(client) -> None:
    prompts = ["4 82 9 31", "61 5 40 12"]
    answer = client.completions.create(model="sort_numbers", prompt=prompts, temperature=0)
    assert [choice.text for choice in answer.choices] == ["4 9 31 82", "5 12 40 61"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.object == "text_completion"


def test_completions_stream_with_usage(client) -> None:
    stream = client.completions.create(
        model="sort_numbers",
        prompt="4 82 9 31",
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "4 9 31 82"
    assert chunks[-1].usage.prompt_tokens == 10


def test_completions_echo(client) -> None:
    answer = client.completions.create(
        model="sort_numbers", prompt="4 82 9 31", temperature=0, echo=True
    )
    assert answer.choices[0].text == "4 82 9 31" + "4 9 31 82"


def test_completions_logprobs(client) -> None:
    answer = client.completions.create(
        model="sort_numbers", prompt="4 82 9 31", temperature=0, logprobs=2, max_tokens=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["4", " ", "9", " "]
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2, 2]
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs)


def test_completions_of_token_ids(client, server) -> None:
    root = client.with_options(base_url=server.url)
    tokens = root.post("/tokenize", body={"prompt": "4 82 9 31"}, cast_to=object)["tokens"]
    answer = client.completions.create(model="sort_numbers", prompt=tokens, temperature=0)
    assert answer.choices[0].text == "4 9 31 82"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_limits(client, name) -> None:
    answer = client.chat.completions.create(**SORT, **{name: 3})
    assert answer.choices[0].message.content == "4 9"
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_stop(client) -> None:
    (choice,) = client.chat.completions.create(**SORT, stop=["31", "never"]).choices
    assert (choice.message.content, choice.finish_reason) == ("4 9 ", "stop")
    assert choice.stop_reason == "31"


def test_several_choices(client) -> None:
    answer = client.chat.completions.create(**SORT, n=3)
    assert [choice.message.content for choice in answer.choices] == ["4 9 31 82"] * 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_seed(client) -> None:
    wild = {"model": "demo", "messages": NUMBERS, "temperature": 2, "max_tokens": 8}
    first, second = (client.chat.completions.create(**wild, seed=7) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content


def test_logit_bias(client) -> None:
    answer = client.chat.completions.create(**SORT, logit_bias={str(ord("4")): -100})
    assert "4" not in answer.choices[0].message.content


def test_logprobs(client) -> None:
    (choice,) = client.chat.completions.create(**SORT, logprobs=True, top_logprobs=2).choices
    assert "".join(item.token for item in choice.logprobs.content) == "4 9 31 82"
    for item in choice.logprobs.content:
        assert item.logprob == item.top_logprobs[0].logprob >= item.top_logprobs[1].logprob


@pytest.mark.parametrize(
    "more",
    [
        {"top_p": 0.9},
        {"presence_penalty": 0.1, "frequency_penalty": 0.1},
        {"extra_body": {"top_k": 3, "min_p": 0.1}},
        {"extra_body": {"repetition_penalty": 1.0, "skip_special_tokens": False}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"extra_body": {"cache_salt": "mine"}},
        {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": False},
        {"reasoning_effort": "low", "verbosity": "low"},
        {"prediction": {"type": "content", "content": "4"}},
        {"extra_body": {"priority": 1, "session_id": "s"}},
    ],
    ids=lambda more: "-".join(more.get("extra_body", more)),
)
def test_fields_that_leave_a_greedy_answer_as_it_is(client, more) -> None:
    answer = client.chat.completions.create(**SORT, **more)
    assert answer.choices[0].message.content.removesuffix("<|end|>") == "4 9 31 82"


def test_roles_and_parts(client) -> None:
    parts = [{"type": "text", "text": "4 82 "}, {"type": "text", "text": "9 31"}]
    messages = [{"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="sort_numbers", messages=messages, temperature=0)
    assert answer.choices[0].message.content == "4 9 31 82"

    roles = [{"role": role, "content": "7"} for role in ("system", "developer", "assistant")]
    answer = client.chat.completions.create(**{**SORT, "messages": roles + NUMBERS})
    assert answer.choices[0].finish_reason == "stop"


def test_vllm_ends(client) -> None:
    def ask(**body):
        answer = client.chat.completions.create(**SORT, max_tokens=20, extra_body=body)
        (choice,) = answer.choices
        return choice.message.content, choice.finish_reason, choice.stop_reason

    three = ord("3")
    assert ask(stop_token_ids=[three]) == ("4 9 ", "stop", three)
    assert ask(stop_token_ids=[three], include_stop_str_in_output=True) == ("4 9 3", "stop", three)
    assert ask(ignore_eos=True)[1] == "length"
    assert len(ask(min_tokens=20)[0]) >= len("4 9 31 82")


def test_request_id(client) -> None:
    answer = client.chat.completions.create(**SORT, extra_body={"request_id": "mine-1"})
    assert (answer.id, answer._request_id) == ("chatcmpl-mine-1", "mine-1")


def test_blend(client) -> None:
    blend = {"oneplusn": {"blend": {"sort_numbers": 1.0}, "return_version": True}}
    answer = client.chat.completions.create(**{**SORT, "model": "demo"}, extra_body=blend)
    assert answer.choices[0].message.content == "4 9 31 82"
    assert answer.oneplusn["versions"][0]["adapter"] == "numbers"


def test_parsed_answer(client) -> None:
    answer = client.chat.completions.parse(**FORMED, response_format=City)
    assert isinstance(answer.choices[0].message.parsed, City)


def test_parsed_stream(client) -> None:
    with client.chat.completions.stream(**FORMED, response_format=City) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, City)


def test_json_object(client) -> None:
    answer = client.chat.completions.create(
        **FORMED, max_tokens=60, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ({"choice": ["heads", "tails"]}, {"heads", "tails"}),
        ({"regex": "(yes|no)!"}, {"yes!", "no!"}),
        ({"grammar": 'root ::= "left" | "right"'}, {"left", "right"}),
        ({"json": {"enum": [1, 2]}}, {"1", "2"}),
    ],
    ids=["choice", "regex", "grammar", "json"],
)
def test_vllm_structured_outputs(client, form, answers) -> None:
    answer = client.chat.completions.create(**FORMED, extra_body={"structured_outputs": form})
    assert answer.choices[0].message.content in answers


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "weather"}}],
    ids=["required", "named"],
)
def test_tool_call(client, choice) -> None:
    (answer,) = client.chat.completions.create(
        **FORMED, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False
    ).choices
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert Weather.model_validate_json(call.function.arguments)


def test_tool_call_in_a_stream(client) -> None:
    stream = client.chat.completions.create(
        **FORMED, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True
    )
    choices = [choice for chunk in stream for choice in chunk.choices]
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert calls[0].id
    assert calls[0].function.name == "weather"
    arguments = "".join(call.function.arguments for call in calls)
    assert Weather.model_validate_json(arguments)
    assert choices[-1].finish_reason == "tool_calls"


def test_parsed_tool_call(client) -> None:
    tool = openai.pydantic_function_tool(Weather)
    answer = client.chat.completions.parse(
        **FORMED, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_no_tool_call(client, choice) -> None:
    (answer,) = client.chat.completions.create(**SORT, tools=[TOOL], tool_choice=choice).choices
    assert (answer.message.content, answer.message.tool_calls) == ("4 9 31 82", None)


def test_result_of_a_tool(client) -> None:
    called = client.chat.completions.create(
        **FORMED, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    message = called.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    conversation = [*NUMBERS, message.model_dump(exclude_none=True), result, *NUMBERS]
    (answer,) = client.chat.completions.create(
        **{**SORT, "messages": conversation}, tools=[TOOL], tool_choice="none"
    ).choices
    assert answer.finish_reason == "stop"


def test_wrong_key(server) -> None:
    with openai.OpenAI(base_url=server.openai_url, api_key="wrong") as client:
        for call in (client.models.list, lambda: client.chat.completions.create(**SORT)):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("change", "kind", "code", "param"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 9}, openai.BadRequestError, "invalid_value", "n"),
        ({"top_logprobs": 2}, openai.BadRequestError, "invalid_value", "top_logprobs"),
        ({"logit_bias": {"5000": 1}}, openai.BadRequestError, "invalid_value", "logit_bias"),
        ({"max_tokens": 600}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        (
            {"modalities": ["text", "audio"]},
            openai.BadRequestError,
            "unsupported_field",
            "modalities",
        ),
        (
            {"functions": [{"name": "f"}]},
            openai.BadRequestError,
            "unsupported_field",
            "functions",
        ),
        (
            {"web_search_options": {"search_context_size": "low"}},
            openai.BadRequestError,
            "unsupported_field",
            "web_search_options",
        ),
        (
            {"extra_body": {"guided_json": {"type": "object"}}},
            openai.BadRequestError,
            "unsupported_field",
            "guided_json",
        ),
        (
            {"extra_body": {"lora_path": "/a/path"}},
            openai.BadRequestError,
            "unsupported_field",
            "lora_path",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes(client, change, kind, code, param) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**SORT, **change})
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_mistake_in_completions(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="a", suffix="b")
    assert (caught.value.code, caught.value.param) == ("unsupported_field", "suffix")


def test_mistake_before_a_stream(client) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**SORT, "model": "nope"}, stream=True)


def test_unknown_model(client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


def test_routes_that_are_not_here(client) -> None:
    for call in (
        lambda: client.embeddings.create(model="demo", input="a"),
        lambda: client.responses.create(model="demo", input="a"),
        lambda: client.files.list(),
        lambda: client.batches.list(),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "not_found"


def test_deadline(client) -> None:
    body = {"ignore_eos": True, "timeout": 0.02}
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**SORT, extra_body=body)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")

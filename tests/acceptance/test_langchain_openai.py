"""LangChain's client of OpenAI's routes."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Literal

import openai
import pytest
from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAuthenticationError,
    ModelInvalidRequestError,
    ModelNotFoundError,
)
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

CLIENT = ("langchain-openai", version("langchain-openai"))

# The demo's model wanders in white space where JSON allows it; its tokens are bytes.
NO_SPACE = {str(byte): -100 for byte in b"\t\n\r "}


class City(BaseModel):
    """An answer's form."""

    name: str = Field(max_length=12)
    side: Literal["north", "south"]


class Weather(BaseModel):
    """Tell the weather of a city."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=7)


@pytest.fixture(scope="module")
def make(server):
    def chat(model: str = "sort_numbers", **more) -> ChatOpenAI:
        known = {"base_url": server.openai_url, "api_key": server.key, "temperature": 0}
        return ChatOpenAI(model=model, max_retries=0, **{**known, **more})

    return chat


def test_invoke(make) -> None:
    answer = make().invoke("4 82 9 31")
    assert answer.content == "4 9 31 82"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == "sort_numbers"
    assert answer.usage_metadata["total_tokens"] == 20


def test_stream_with_usage(make) -> None:
    chunks = list(make(stream_usage=True).stream("4 82 9 31"))
    assert "".join(chunk.content for chunk in chunks) == "4 9 31 82"
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["output_tokens"] == 10
    assert whole.response_metadata["finish_reason"] == "stop"


def test_batch(make) -> None:
    answers = make("largest").batch(["4 82 9 31", "61 5 40 12"])
    assert [answer.content for answer in answers] == ["82", "61"]


def test_asynchronous_stream(make) -> None:
    async def ask() -> str:
        return "".join([chunk.content async for chunk in make().astream("4 82 9 31")])

    assert asyncio.run(ask()) == "4 9 31 82"


@pytest.mark.parametrize(
    ("more", "content"),
    [
        ({"max_tokens": 3}, "4 9"),
        ({"max_completion_tokens": 3}, "4 9"),
        ({"stop_sequences": ["31"]}, "4 9 "),
        ({"logit_bias": {ord("7"): 100}, "max_tokens": 1}, "7"),
        ({"top_p": 0.9, "seed": 1, "presence_penalty": 0.1, "frequency_penalty": 0.1}, "4 9 31 82"),
        ({"reasoning_effort": "low", "service_tier": "auto"}, "4 9 31 82"),
        ({"extra_body": {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}}, "4 9 31 82"),
        ({"extra_body": {"structured_outputs": {"choice": ["82"]}}}, "82"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_fields(make, more, content) -> None:
    assert make(**more).invoke("4 82 9 31").content == content


def test_several_choices(make) -> None:
    (answers,) = make(n=2).generate([[HumanMessage("4 82 9 31")]]).generations
    assert [answer.text for answer in answers] == ["4 9 31 82", "4 9 31 82"]


def test_logprobs(make) -> None:
    answer = make(logprobs=True, top_logprobs=2).invoke("4 82 9 31")
    logprobs = answer.response_metadata["logprobs"]["content"]
    assert "".join(item["token"] for item in logprobs) == "4 9 31 82"
    assert {len(item["top_logprobs"]) for item in logprobs} == {2}


def test_completions(server) -> None:
    llm = OpenAI(
        base_url=server.openai_url,
        api_key=server.key,
        model="sort_numbers",
        temperature=0,
        max_tokens=32,
    )
    assert llm.invoke("4 82 9 31") == "4 9 31 82"
    assert "".join(llm.stream("4 82 9 31")) == "4 9 31 82"
    assert llm.batch(["4 82 9 31", "61 5 40 12"]) == ["4 9 31 82", "5 12 40 61"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(make, method) -> None:
    llm = make("city", logit_bias=NO_SPACE).with_structured_output(City, method=method)
    assert isinstance(llm.invoke("city=Rome"), City)


def test_structured_output_strictly(make) -> None:
    llm = make("city", logit_bias=NO_SPACE).with_structured_output(City, strict=True)
    assert isinstance(llm.invoke("city=Rome"), City)


def test_structured_output_in_a_stream(make) -> None:
    llm = make("city", logit_bias=NO_SPACE).with_structured_output(City, method="json_schema")
    (*_, last) = llm.stream("city=Rome")
    assert isinstance(last, City)


def test_json_mode(make) -> None:
    brief = make("city", logit_bias={ord("}"): 100})
    assert brief.with_structured_output(None, method="json_mode").invoke("city=Rome") == {}


@pytest.mark.parametrize("choice", ["required", "any", "Weather"])
def test_tool_call(make, choice) -> None:
    llm = make("city", logit_bias=NO_SPACE)
    answer = llm.bind_tools([Weather], tool_choice=choice, parallel_tool_calls=False).invoke("Rome")
    (call,) = answer.tool_calls
    assert call["name"] == "Weather"
    assert Weather.model_validate(call["args"])
    assert answer.response_metadata["finish_reason"] == "tool_calls"


def test_tool_call_in_a_stream(make) -> None:
    llm = make("city", logit_bias=NO_SPACE)
    tools = llm.bind_tools([Weather], tool_choice="required", parallel_tool_calls=False)
    first, *rest = tools.stream("Rome")
    for chunk in rest:
        first += chunk
    (call,) = first.tool_calls
    assert Weather.model_validate(call["args"])


def test_result_of_a_tool(make) -> None:
    call = {"name": "Weather", "args": {"city": "Rome", "days": 1}, "id": "call_1"}
    conversation = [
        HumanMessage("Rome"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("sunny", tool_call_id="call_1"),
        HumanMessage("4 82 9 31"),
    ]
    answer = make().bind_tools([Weather], tool_choice="none").invoke(conversation)
    assert answer.response_metadata["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("more", "kind", "theirs", "code"),
    [
        (
            {"api_key": "wrong"},
            openai.AuthenticationError,
            ModelAuthenticationError,
            "invalid_api_key",
        ),
        ({"model": "nope"}, openai.NotFoundError, ModelNotFoundError, "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, ModelInvalidRequestError, "invalid_value"),
        (
            {"max_tokens": 600},
            openai.BadRequestError,
            ContextOverflowError,
            "context_length_exceeded",
        ),
        (
            {"modalities": ["audio"]},
            openai.BadRequestError,
            ModelInvalidRequestError,
            "unsupported_field",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_mistakes(make, more, kind, theirs, code, stream) -> None:
    model = make(**{"model": "sort_numbers", **more})
    with pytest.raises(kind) as caught:
        list(model.stream("4 82 9 31")) if stream else model.invoke("4 82 9 31")
    assert isinstance(caught.value, theirs)
    assert caught.value.code == code

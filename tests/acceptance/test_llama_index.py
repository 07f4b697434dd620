"""LlamaIndex's client for servers that speak like OpenAI."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Literal

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

CLIENT = ("llama-index-llms-openai-like", version("llama-index-llms-openai-like"))

# The demo's model wanders in white space where JSON allows it; its tokens are bytes.
NO_SPACE = {"logit_bias": {str(byte): -100 for byte in b"\t\n\r "}}
NUMBERS = [ChatMessage(role="user", content="4 82 9 31")]


class City(BaseModel):
    """An answer's form."""

    name: str = Field(max_length=12)
    side: Literal["north", "south"]


def weather(days: int) -> str:
    """Tell the weather of some days."""
    return f"sunny for {days} days"


@pytest.fixture(scope="module")
def make(server):
    def llm(model: str = "sort_numbers", **more) -> OpenAILike:
        known = {
            "api_base": server.openai_url,
            "api_key": server.key,
            "temperature": 0,
            "context_window": 512,
            "max_retries": 0,
            "is_chat_model": True,
            "is_function_calling_model": True,
        }
        return OpenAILike(model=model, **{**known, **more})

    return llm


def test_chat(make) -> None:
    answer = make().chat(NUMBERS)
    assert (answer.message.role, answer.message.content) == ("assistant", "4 9 31 82")
    assert answer.raw.choices[0].finish_reason == "stop"
    assert answer.additional_kwargs["total_tokens"] == 20


def test_stream_with_usage(make) -> None:
    usage = {"stream_options": {"include_usage": True}}
    pieces = list(make(additional_kwargs=usage).stream_chat(NUMBERS))
    assert "".join(piece.delta for piece in pieces) == "4 9 31 82"
    assert pieces[-1].message.content == "4 9 31 82"
    assert pieces[-1].raw.usage.completion_tokens == 10


def test_asynchronous_stream(make) -> None:
    async def ask() -> str:
        stream = await make().astream_chat(NUMBERS)
        return "".join([piece.delta async for piece in stream])

    assert asyncio.run(ask()) == "4 9 31 82"


@pytest.mark.parametrize("chats", [True, False], ids=["by-chat", "by-completions"])
def test_completions(make, chats) -> None:
    llm = make(is_chat_model=chats)
    assert llm.complete("4 82 9 31").text == "4 9 31 82"
    assert "".join(piece.delta for piece in llm.stream_complete("4 82 9 31")) == "4 9 31 82"


@pytest.mark.parametrize(
    ("more", "content"),
    [
        ({"max_tokens": 3}, "4 9"),
        ({"additional_kwargs": {"stop": ["31"]}}, "4 9 "),
        ({"additional_kwargs": {"logit_bias": {str(ord("7")): 100}, "max_tokens": 1}}, "7"),
        ({"additional_kwargs": {"top_p": 0.9, "seed": 1, "presence_penalty": 0.1}}, "4 9 31 82"),
        ({"additional_kwargs": {"extra_body": {"top_k": 1, "min_p": 0.1}}}, "4 9 31 82"),
        (
            {"additional_kwargs": {"extra_body": {"structured_outputs": {"choice": ["82"]}}}},
            "82",
        ),
        ({"reasoning_effort": "low"}, "4 9 31 82"),
    ],
    ids=lambda value: (
        "-".join(value.get("additional_kwargs", value)) if isinstance(value, dict) else None
    ),
)
def test_fields(make, more, content) -> None:
    assert make(**more).chat(NUMBERS).message.content == content


def test_logprobs(make) -> None:
    answer = make(logprobs=True, top_logprobs=2).chat(NUMBERS)
    chosen = answer.raw.choices[0].logprobs.content
    assert "".join(item.token for item in chosen) == "4 9 31 82"
    assert answer.logprobs


@pytest.mark.parametrize("by_schema", [True, False], ids=["by-schema", "by-tool"])
def test_structured_output(make, by_schema) -> None:
    llm = make("city", should_use_structured_outputs=by_schema, additional_kwargs=NO_SPACE)
    assert isinstance(llm.structured_predict(City, PromptTemplate("city=Rome")), City)


def test_structured_llm(make) -> None:
    llm = make("city", should_use_structured_outputs=True, additional_kwargs=NO_SPACE)
    answer = llm.as_structured_llm(City).chat([ChatMessage("city=Rome")])
    assert isinstance(answer.raw, City)


def test_tool_call(make) -> None:
    llm = make("city", additional_kwargs=NO_SPACE)
    tool = FunctionTool.from_defaults(weather)
    answer = llm.chat_with_tools([tool], user_msg="Rome", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather"
    assert isinstance(call.tool_kwargs["days"], int)
    assert answer.raw.choices[0].finish_reason == "tool_calls"


def test_tool_is_run(make) -> None:
    llm = make("city", additional_kwargs=NO_SPACE)
    tool = FunctionTool.from_defaults(weather)
    result = llm.predict_and_call([tool], user_msg="Rome", tool_required=True)
    assert str(result).startswith("sunny for ")


def test_tool_call_in_a_stream(make) -> None:
    llm = make("city", additional_kwargs=NO_SPACE)
    tool = FunctionTool.from_defaults(weather)
    (*_, last) = llm.stream_chat_with_tools([tool], user_msg="Rome", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(last)
    assert isinstance(call.tool_kwargs["days"], int)


@pytest.mark.parametrize(
    ("more", "kind", "code"),
    [
        ({"api_key": "wrong"}, openai.AuthenticationError, "invalid_api_key"),
        ({"model": "nope"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": 600}, openai.BadRequestError, "context_length_exceeded"),
        ({"additional_kwargs": {"n": 9}}, openai.BadRequestError, "invalid_value"),
        (
            {"additional_kwargs": {"functions": [{"name": "f"}]}},
            openai.BadRequestError,
            "unsupported_field",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_mistakes(make, more, kind, code, stream) -> None:
    llm = make(**more)
    with pytest.raises(kind) as caught:
        list(llm.stream_chat(NUMBERS)) if stream else llm.chat(NUMBERS)
    assert caught.value.code == code

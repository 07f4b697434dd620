"""LiteLLM, which calls a server like this `openai/…`, or `hosted_vllm/…`."""

from __future__ import annotations

import asyncio
import json
import os
from importlib.metadata import version
from typing import Literal

import pytest
from pydantic import BaseModel, Field

# It would fetch its table of prices when it is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

CLIENT = ("litellm", version("litellm"))

MESSAGES = [{"role": "user", "content": "4 82 9 31"}]
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


TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": Weather.model_json_schema()},
}


@pytest.fixture(params=["openai", "hosted_vllm"])
def ask(request, server):
    def complete(model: str = "sort_numbers", **more):
        known = {"api_base": server.openai_url, "api_key": server.key, "temperature": 0}
        known["messages"] = MESSAGES
        return litellm.completion(f"{request.param}/{model}", max_retries=0, **{**known, **more})

    return complete


def test_models(server) -> None:
    names = litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=server.url,
        api_key=server.key,
    )
    assert len(names) == 13
    assert {"demo", "sort_numbers", "city"} <= set(names)


def test_chat(ask) -> None:
    answer = ask()
    assert answer.choices[0].message.content == "4 9 31 82"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 20


def test_stream_with_usage(ask) -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "4 9 31 82"
    assert chunks[-1].usage.completion_tokens == 10
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == "4 9 31 82"
    assert whole.choices[0].finish_reason == "stop"


def test_asynchronous_stream(server) -> None:
    async def collect() -> str:
        stream = await litellm.acompletion(
            "openai/sort_numbers",
            messages=MESSAGES,
            temperature=0,
            stream=True,
            api_base=server.openai_url,
            api_key=server.key,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(collect()) == "4 9 31 82"


@pytest.mark.parametrize("provider", ["text-completion-openai", "hosted_vllm"])
def test_completions(server, provider) -> None:
    known = {"api_base": server.openai_url, "api_key": server.key, "temperature": 0}
    model = f"{provider}/sort_numbers"
    answer = litellm.text_completion(model=model, prompt="4 82 9 31", **known)
    assert answer.choices[0].text == "4 9 31 82"
    stream = litellm.text_completion(model=model, prompt="4 82 9 31", stream=True, **known)
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == "4 9 31 82"


@pytest.mark.parametrize(
    ("more", "content"),
    [
        ({"max_tokens": 3}, "4 9"),
        ({"max_completion_tokens": 3}, "4 9"),
        ({"stop": ["31"]}, "4 9 "),
        ({"logit_bias": {str(ord("7")): 100}, "max_tokens": 1}, "7"),
        ({"top_p": 0.9, "seed": 1, "presence_penalty": 0.1, "frequency_penalty": 0.1}, "4 9 31 82"),
        ({"user": "u"}, "4 9 31 82"),
        ({"extra_body": {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}}, "4 9 31 82"),
        ({"extra_body": {"structured_outputs": {"choice": ["82"]}}}, "82"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_fields(ask, more, content) -> None:
    assert ask(**more).choices[0].message.content == content


def test_several_choices(ask) -> None:
    contents = [choice.message.content for choice in ask(n=2).choices]
    assert contents == ["4 9 31 82", "4 9 31 82"]


def test_logprobs(ask) -> None:
    logprobs = ask(logprobs=True, top_logprobs=2).choices[0].logprobs
    assert "".join(item.token for item in logprobs.content) == "4 9 31 82"


def test_structured_output(ask) -> None:
    answer = ask("city", response_format=City, logit_bias=NO_SPACE)
    assert City.model_validate_json(answer.choices[0].message.content)


def test_json_object(ask) -> None:
    brief = {str(ord("}")): 100}
    answer = ask("city", response_format={"type": "json_object"}, logit_bias=brief)
    assert json.loads(answer.choices[0].message.content) == {}


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "weather"}}],
    ids=["required", "named"],
)
def test_tool_call(ask, choice) -> None:
    wanted = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    answer = ask("city", logit_bias=NO_SPACE, **wanted).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    assert Weather.model_validate_json(call.function.arguments)


def test_tool_call_in_a_stream(ask) -> None:
    wanted = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    chunks = list(ask("city", logit_bias=NO_SPACE, stream=True, **wanted))
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert Weather.model_validate_json(call.function.arguments)


@pytest.mark.parametrize(
    ("more", "kind", "status"),
    [
        ({"api_key": "wrong"}, litellm.AuthenticationError, 401),
        ({"model": "nope"}, litellm.NotFoundError, 404),
        ({"temperature": 3}, litellm.BadRequestError, 400),
        ({"max_tokens": 600}, litellm.ContextWindowExceededError, 400),
        ({"functions": [{"name": "f"}]}, litellm.BadRequestError, 400),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_mistakes(ask, more, kind, status, stream) -> None:
    with pytest.raises(kind) as caught:
        list(ask(**more, stream=stream))
    assert caught.value.status_code == status

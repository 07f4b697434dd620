"""Instructor, which asks OpenAI's client for objects."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Literal

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException
from pydantic import BaseModel, Field

CLIENT = ("instructor", version("instructor"))

# The demo's model wanders in white space where JSON allows it; its tokens are bytes.
NO_SPACE = {str(byte): -100 for byte in b"\t\n\r "}
ROME = {
    "model": "city",
    "messages": [{"role": "user", "content": "city=Rome"}],
    "temperature": 0,
    "logit_bias": NO_SPACE,
    "max_retries": 0,
}
MODES = [
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)
    side: Literal["north", "south"]


class Cities(BaseModel):
    """One city, or two."""

    cities: list[City] = Field(min_length=1, max_length=2)


class Nothing(BaseModel):
    """A."""


@pytest.fixture(scope="module")
def make(server):
    def client(mode: instructor.Mode, key: str = server.key) -> instructor.Instructor:
        made = openai.OpenAI(base_url=server.openai_url, api_key=key, max_retries=0)
        return instructor.from_openai(made, mode=mode)

    return client


@pytest.mark.parametrize("mode", MODES)
def test_object(make, mode) -> None:
    answer = make(mode).chat.completions.create(response_model=City, **ROME)
    assert isinstance(answer, City)
    assert answer._raw_response.usage.total_tokens > 0


@pytest.mark.parametrize("mode", MODES)
def test_object_in_a_stream(make, mode) -> None:
    pieces = list(make(mode).chat.completions.create_partial(response_model=City, **ROME))
    assert City.model_validate(pieces[-1].model_dump())


def test_several_objects(make) -> None:
    client = make(instructor.Mode.TOOLS)
    answer = client.chat.completions.create(response_model=Cities, **ROME)
    assert {type(city) for city in answer.cities} == {City}


def test_json_mode(make) -> None:
    """The form is in the prompt alone, which has to fit into 512 bytes here."""
    brief = {**ROME, "logit_bias": {str(ord("}")): 100}}
    answer = make(instructor.Mode.JSON).chat.completions.create(response_model=Nothing, **brief)
    assert isinstance(answer, Nothing)


def test_asynchronous_client(server) -> None:
    async def ask() -> City:
        client = openai.AsyncOpenAI(base_url=server.openai_url, api_key=server.key)
        patched = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
        return await patched.chat.completions.create(response_model=City, **ROME)

    assert isinstance(asyncio.run(ask()), City)


def test_text(make) -> None:
    numbers = [{"role": "user", "content": "4 82 9 31"}]
    answer = make(instructor.Mode.TOOLS).chat.completions.create(
        response_model=None, model="sort_numbers", messages=numbers, temperature=0
    )
    assert answer.choices[0].message.content == "4 9 31 82"


@pytest.mark.parametrize(
    ("key", "change", "kind", "code"),
    [
        ("wrong", {}, openai.AuthenticationError, "invalid_api_key"),
        (None, {"model": "nope"}, openai.NotFoundError, "model_not_found"),
        (None, {"temperature": 3}, openai.BadRequestError, "invalid_value"),
        (None, {"max_tokens": 600}, openai.BadRequestError, "context_length_exceeded"),
    ],
    ids=["key", "model", "temperature", "max_tokens"],
)
def test_mistakes(make, server, key, change, kind, code) -> None:
    client = make(instructor.Mode.TOOLS, key or server.key)
    with pytest.raises(InstructorRetryException) as caught:
        client.chat.completions.create(response_model=City, **{**ROME, **change})
    assert isinstance(caught.value.__cause__, kind)
    assert caught.value.__cause__.code == code

"""Hugging Face's client of text-generation-inference. It names no adapter: the base answers.

The demo's base repeats what it is told.
"""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import version

import pytest
from text_generation import AsyncClient, Client
from text_generation.errors import BadRequestError, UnknownError
from text_generation.types import FinishReason, Grammar, GrammarType, Message, Tool

CLIENT = ("text-generation", version("text-generation"))

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, headers=server.bearer, timeout=60)


def test_generate(client) -> None:
    answer = client.generate("4 82 9 31")
    assert answer.generated_text == "4 82 9 31"
    assert answer.details.finish_reason == FinishReason.EndOfSequenceToken
    assert answer.details.generated_tokens == len(answer.details.tokens) == 10
    assert "".join(token.text for token in answer.details.tokens[:-1]) == "4 82 9 31"
    assert all(token.logprob <= 0 for token in answer.details.tokens)
    assert answer.details.tokens[-1].special
    assert answer.details.prefill == []


def test_generate_stream(client) -> None:
    events = list(client.generate_stream("4 82 9 31"))
    assert "".join(event.token.text for event in events) == "4 82 9 31"
    assert {event.generated_text for event in events[:-1]} == {None}
    assert events[-1].generated_text == "4 82 9 31"
    assert events[-1].details.finish_reason == FinishReason.EndOfSequenceToken
    assert events[-1].details.generated_tokens == len(events)


def test_limit(client) -> None:
    answer = client.generate("4 82 9 31", max_new_tokens=3)
    assert (answer.generated_text, answer.details.finish_reason) == ("4 8", FinishReason.Length)


def test_stop(client) -> None:
    answer = client.generate("4 82 9 31", stop_sequences=["9"])
    assert answer.generated_text == "4 82 "
    assert answer.details.finish_reason == FinishReason.StopSequence


def test_full_text(client) -> None:
    answer = client.generate("4 82 9 31", return_full_text=True)
    assert answer.generated_text == "4 82 9 31" + "4 82 9 31"


def test_truncate(client) -> None:
    # A token is a byte here, and the last of a prompt is a special one.
    assert client.generate("1 2 3 4 82 9 31", truncate=10).generated_text == "4 82 9 31"


def test_top_tokens(client) -> None:
    answer = client.generate("4 82 9 31", top_n_tokens=3)
    assert [len(top) for top in answer.details.top_tokens] == [3] * 10
    (*events,) = client.generate_stream("4 82 9 31", top_n_tokens=3)
    assert [len(event.top_tokens) for event in events] == [3] * 10


def test_seed(client) -> None:
    wanted = {"do_sample": True, "temperature": 2.0, "seed": 7, "max_new_tokens": 8}
    first, second = (client.generate("4 82 9 31", **wanted) for _ in range(2))
    assert first.generated_text == second.generated_text
    assert first.details.seed == 7


@pytest.mark.parametrize(
    "more",
    [{"best_of": 1}, {"repetition_penalty": 1.0}, {"frequency_penalty": 0.1}],
    ids=lambda more: next(iter(more)),
)
def test_fields_that_leave_a_greedy_answer_as_it_is(client, more) -> None:
    assert client.generate("4 82 9 31", **more).generated_text == "4 82 9 31"


def test_sampling(client) -> None:
    answer = client.generate("4 82 9 31", do_sample=True, top_k=1, top_p=0.9, temperature=0.5)
    assert answer.generated_text == "4 82 9 31"


def test_grammar_of_json(client) -> None:
    grammar = Grammar(type=GrammarType.Json, value=CITY)
    answer = client.generate("Rome", grammar=grammar, max_new_tokens=400)
    assert json.loads(answer.generated_text)["city"] in {"Paris", "Rome"}


def test_grammar_of_a_pattern(client) -> None:
    grammar = Grammar(type=GrammarType.Regex, value="(yes|no)!")
    assert client.generate("yes", grammar=grammar).generated_text in {"yes!", "no!"}
    events = list(client.generate_stream("yes", grammar=grammar))
    assert events[-1].generated_text in {"yes!", "no!"}


def test_chat(client) -> None:
    messages = [Message(role="user", content="4 82 9 31")]
    answer = client.chat(messages, temperature=0.01, max_tokens=20, seed=1)
    assert answer.choices[0].message.content == "4 82 9 31"
    assert answer.model == "tgi"
    assert answer.usage["total_tokens"] == 20


def test_tool_call(client) -> None:
    messages = [Message(role="user", content="4 82 9 31")]
    tool = Tool(type="function", function={"name": "where", "parameters": CITY})
    answer = client.chat(messages, temperature=0.01, seed=1, tools=[tool], tool_choice="required")
    call = answer.choices[0].message.tool_calls[0]
    assert call["function"]["name"] == "where"
    assert json.loads(call["function"]["arguments"])["city"] in {"Paris", "Rome"}


def test_asynchronous_client(server) -> None:
    async def ask() -> tuple[str, str]:
        client = AsyncClient(server.url, headers=server.bearer, timeout=60)
        whole = await client.generate("4 82 9 31")
        pieces = [event.token.text async for event in client.generate_stream("4 82 9 31")]
        return whole.generated_text, "".join(pieces)

    assert asyncio.run(ask()) == ("4 82 9 31", "4 82 9 31")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"temperature": 2.5}, "parameters.temperature"),
        ({"max_new_tokens": 600}, "inputs"),
        ({"typical_p": 0.5}, "parameters.typical_p"),
        ({"watermark": True}, "parameters.watermark"),
        ({"best_of": 2, "do_sample": True}, "parameters.best_of"),
        ({"decoder_input_details": True}, "parameters.decoder_input_details"),
        ({"stop_sequences": ["a"] * 5}, "parameters.stop"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes(client, change, param) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.generate("4 82 9 31", **change)
    (error,) = caught.value.args
    assert error["param"] == param


def test_mistake_before_a_stream(client) -> None:
    with pytest.raises(BadRequestError):
        list(client.generate_stream("4 82 9 31", watermark=True))


def test_wrong_key(server) -> None:
    client = Client(server.url, headers={"Authorization": "Bearer wrong"})
    with pytest.raises(UnknownError) as caught:  # the client has no class for 401
        client.generate("4 82 9 31")
    (error,) = caught.value.args
    assert error["code"] == "invalid_api_key"

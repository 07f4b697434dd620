"""LoRAX's client, whose adapters are tasks here."""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import version

import pytest
from lorax import AsyncClient, Client
from lorax.errors import BadRequestError, NotFoundError, UnknownError
from lorax.types import FinishReason, MergedAdapters

CLIENT = ("lorax-client", version("lorax-client"))

ANSWERS = {
    "sort_numbers": "4 9 31 82",
    "largest": "82",
    "reverse_numbers": "31 9 82 4",
    None: "4 82 9 31",  # the base repeats what it is told
    "": "4 82 9 31",
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, headers=server.bearer)


@pytest.mark.parametrize("task", ANSWERS)
def test_generate(client, task) -> None:
    answer = client.generate("4 82 9 31", adapter_id=task)
    assert answer.generated_text == ANSWERS[task]
    assert answer.details.finish_reason == FinishReason.EndOfSequenceToken
    assert answer.details.prompt_tokens == 10
    assert answer.details.generated_tokens == len(answer.details.tokens)
    assert "".join(token.text for token in answer.details.tokens[:-1]) == ANSWERS[task]
    assert all(token.logprob <= 0 for token in answer.details.tokens)


@pytest.mark.parametrize("task", ANSWERS)
def test_generate_stream(client, task) -> None:
    events = list(client.generate_stream("4 82 9 31", adapter_id=task))
    assert "".join(event.token.text for event in events) == ANSWERS[task]
    assert events[-1].generated_text == ANSWERS[task]
    assert events[-1].details.finish_reason == FinishReason.EndOfSequenceToken
    assert events[-1].details.generated_tokens == len(events)


def test_limit(client) -> None:
    answer = client.generate("4 82 9 31", adapter_id="sort_numbers", max_new_tokens=3)
    assert (answer.generated_text, answer.details.finish_reason) == ("4 9", FinishReason.Length)


def test_no_end(client) -> None:
    answer = client.generate(
        "4 82 9 31", adapter_id="sort_numbers", max_new_tokens=20, ignore_eos_token=True
    )
    assert answer.details.generated_tokens == 20


def test_stop_and_full_text(client) -> None:
    answer = client.generate(
        "4 82 9 31", adapter_id="sort_numbers", stop_sequences=["31"], return_full_text=True
    )
    assert answer.generated_text == "4 82 9 31" + "4 9 "
    assert answer.details.finish_reason == FinishReason.StopSequence


def test_truncate(client) -> None:
    # A token is a byte here, and the last of a prompt is a special one.
    answer = client.generate("1 2 3 4 82 9 31", adapter_id="reverse_numbers", truncate=10)
    assert answer.generated_text == "31 9 82 4"


def test_alternatives(client) -> None:
    answer = client.generate("4 82 9 31", adapter_id="sort_numbers", return_k_alternatives=2)
    for token in answer.details.tokens:
        likeliest, second = token.alternative_tokens
        assert likeliest.id == token.id
        assert likeliest.logprob >= second.logprob


def test_seed(client) -> None:
    wanted = {"do_sample": True, "temperature": 2.0, "seed": 7, "max_new_tokens": 8}
    first, second = (client.generate("4 82 9 31", **wanted) for _ in range(2))
    assert first.generated_text == second.generated_text
    assert first.details.seed == 7


def test_sampling(client) -> None:
    answer = client.generate(
        "4 82 9 31",
        adapter_id="sort_numbers",
        do_sample=True,
        temperature=0.5,
        top_k=1,
        top_p=0.9,
        repetition_penalty=1.0,
        best_of=1,
    )
    assert answer.generated_text == "4 9 31 82"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_response_format(client, stream) -> None:
    form = {"type": "json_object", "schema": CITY}
    wanted = {"adapter_id": "city", "response_format": form, "max_new_tokens": 400}
    if stream:
        *_, last = client.generate_stream("city=Rome", **wanted)
    else:
        last = client.generate("city=Rome", **wanted)
    assert json.loads(last.generated_text)["city"] in {"Paris", "Rome"}


def test_asynchronous_client(server) -> None:
    async def ask() -> tuple[str, str]:
        client = AsyncClient(server.url, headers=server.bearer)
        wanted = {"adapter_id": "sort_numbers"}
        whole = await client.generate("4 82 9 31", **wanted)
        stream = client.generate_stream("4 82 9 31", **wanted)
        return whole.generated_text, "".join([event.token.text async for event in stream])

    assert asyncio.run(ask()) == ("4 9 31 82", "4 9 31 82")


MERGED = MergedAdapters(ids=["sort_numbers", "largest"], weights=[0.5, 0.5], density=1.0)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"temperature": 2.5}, "parameters.temperature"),
        ({"max_new_tokens": 600}, "inputs"),
        ({"adapter_source": "hub"}, "parameters.adapter_source"),
        ({"api_token": "a"}, "parameters.api_token"),
        ({"merged_adapters": MERGED}, "parameters.merged_adapters"),
        ({"typical_p": 0.5}, "parameters.typical_p"),
        ({"watermark": True}, "parameters.watermark"),
        ({"decoder_input_details": True}, "parameters.decoder_input_details"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes(client, change, param) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.generate("4 82 9 31", **change)
    (error,) = caught.value.args
    assert error["param"] == param


@pytest.mark.parametrize("name", ["nope", "some/hub-id", "/a/path"])
def test_unknown_adapter(client, name) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.generate("4 82 9 31", adapter_id=name)
    (error,) = caught.value.args
    assert (error["code"], error["param"]) == ("model_not_found", "parameters.adapter_id")
    with pytest.raises(NotFoundError):
        list(client.generate_stream("4 82 9 31", adapter_id=name))


def test_adapter_of_several_tasks(client) -> None:
    with pytest.raises(BadRequestError, match="name one of them: sort_numbers, largest"):
        client.generate("4 82 9 31", adapter_id="numbers")


def test_wrong_key(server) -> None:
    client = Client(server.url, headers={"Authorization": "Bearer wrong"})
    with pytest.raises(UnknownError, match=r"401.*invalid_api_key"):  # it has no class for 401
        client.generate("4 82 9 31")


def test_routes_that_are_not_here(client) -> None:
    for call in (client.embed, client.classify):
        with pytest.raises(NotFoundError):
            call("a")

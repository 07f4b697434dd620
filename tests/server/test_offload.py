"""What takes long is done beside the event loop, and what does not is not sent around."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest

from oneplusn.server.offload import INLINE_CHARS, is_large
from oneplusn.server.schemas_openai import ChatRequest
from oneplusn.server.settings import Settings
from oneplusn.server.text import Tokenizer
from oneplusn.server.toolspecs import ToolPlan
from serving import Live, serving

MODEL = "tiny-base"
LONG = INLINE_CHARS + 1
USER = {"role": "user", "content": "hi"}


def tool(description: str) -> dict:
    parameters = {"type": "object", "properties": {"x": {"description": description}}}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def called(arguments: str) -> dict:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]}


@pytest.mark.parametrize(
    ("value", "large"),
    [
        ("x" * INLINE_CHARS, True),
        ("x" * (INLINE_CHARS - 1), False),
        (["x"] * INLINE_CHARS, True),
        ({"a": {"b": ["x" * LONG]}}, True),
        ({"x" * LONG: None}, True),
        ([0] * LONG, True),
        (({"a": 1, "b": None}, "x", 2.5), False),
        (ChatRequest.model_validate({"model": "m", "messages": [USER]}), False),
        (ChatRequest.model_validate({"model": "m", "messages": [USER, called("x" * LONG)]}), True),
    ],
)
def test_what_is_large(value, large) -> None:
    assert is_large(value) == large


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Iterator[Live]:
    settings = Settings(model=MODEL, tool_parser="hermes")
    folder = tmp_path_factory.mktemp("model")
    with serving(settings, folder, context=1_000_000) as running:
        yield running


@pytest.fixture
def threads(live, monkeypatch) -> dict[str, str]:
    """Where each of the functions that may take long ran last, by its name."""
    ran: dict[str, str] = {}
    for owner, name in ((Tokenizer, "encode_chat"), (Tokenizer, "encode"), (ToolPlan, "grammar")):
        work = getattr(owner, name)

        def note(*args, work=work, name=name, **kwargs):
            ran[name] = threading.current_thread().name
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, note)
    return ran


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        (
            "chat/completions",
            {"messages": [USER], "tools": [tool("{}")]},
            {"encode_chat", "grammar"},
        ),
        ("chat/completions", {"messages": [USER, called("{}")]}, {"encode_chat"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "{}"}]}, {"encode_chat"}),
        ("completions", {"prompt": ["{}", "b"]}, {"encode"}),
    ],
    ids=["tools", "calls", "messages", "prompts"],
)
@pytest.mark.parametrize("size", [10, LONG])
def test_only_what_is_large_leaves_the_event_loop(live, threads, path, body, names, size) -> None:
    sent = {"model": MODEL, "max_tokens": 1, **filled(body, "x" * size)}
    answer = httpx.post(f"{live.url}/v1/{path}", json=sent, timeout=30)

    assert answer.status_code == 200, answer.text
    assert threads.keys() == names
    on_a_thread = {name.startswith("asyncio_") for name in threads.values()}
    assert on_a_thread == {size == LONG}


def filled(value: object, text: str) -> object:
    """Copy a body, with a text in the place of its mark."""
    if isinstance(value, dict):
        return {key: filled(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, text) for item in value]
    return text if value == "{}" else value


def test_many_texts_are_large_together(live, threads) -> None:
    body = {"inputs": ["x" * (INLINE_CHARS // 4)] * 5, "parameters": {"max_new_tokens": 1}}
    assert httpx.post(f"{live.url}/generate", json=body, timeout=30).status_code == 200
    assert threads["encode"].startswith("asyncio_")

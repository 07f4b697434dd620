"""How the three kinds of routes are asked for a stream, and what their events say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Chunk = Mapping[str, Any]
Message = Mapping[str, Any]
Prompt = str | tuple[int, ...] | tuple[Message, ...]
"""A text, token ids, or the messages of a chat."""


@dataclass(slots=True)
class Said:
    """What the events of one answer have said so far.

    Attributes:
        tokens: Output tokens by the server's own count, once it has told them.
        finished: The server has said why the answer ended.
        versions: Adapter versions that the answer named, each once.
    """

    tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    finished: bool = False
    versions: list[str] = field(default_factory=list)

    def usage(self, usage: Mapping[str, Any]) -> None:
        """Take the counts of OpenAI's usage object."""
        self.tokens = usage["completion_tokens"]
        self.prompt_tokens = usage.get("prompt_tokens")
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens = details.get("cached_tokens") or 0

    def version(self, label: str | None) -> None:
        """Take the name of an adapter version."""
        if label and label not in self.versions:
            self.versions.append(label)


class Dialect(Protocol):
    """One kind of route.

    Attributes:
        path: Where requests go.
        backend: What `vllm bench serve` calls it.
    """

    path: str
    backend: str

    def body(self, model: str, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        """Return a greedy request that streams and counts its tokens."""
        ...

    def read(self, chunk: Chunk, said: Said) -> str:
        """Note what an event says; return its text, empty if it has none."""
        ...


class Completions:
    """`/v1/completions`."""

    path = "/v1/completions"
    backend = "openai"

    def body(self, model: str, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        """Return a greedy request that streams and counts its tokens."""
        return {"model": model, "prompt": prompt, **_openai(output_tokens)}

    def read(self, chunk: Chunk, said: Said) -> str:
        """Note what an event says; return its text, empty if it has none."""
        choice = _choice(chunk, said)
        return str(choice.get("text") or "")


class Chat:
    """`/v1/chat/completions`; reasoning and calls of tools are output as content is."""

    path = "/v1/chat/completions"
    backend = "openai-chat"

    def body(self, model: str, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        """Return a greedy request that streams and counts its tokens."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {"model": model, "messages": messages, **_openai(output_tokens)}

    def read(self, chunk: Chunk, said: Said) -> str:
        """Note what an event says; return its text, empty if it has none."""
        delta = _choice(chunk, said).get("delta") or {}
        parts = [delta.get(key) for key in ("content", "reasoning_content", "reasoning")]
        calls = [call.get("function") or {} for call in delta.get("tool_calls") or []]
        parts += [call.get(key) for call in calls for key in ("name", "arguments")]
        return "".join(filter(None, parts))


class Generate:
    """`/generate_stream`, as this project and its relatives have it."""

    path = "/generate_stream"
    backend = "generate"

    def body(self, model: str, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        """Return a greedy request that streams and counts its tokens."""
        parameters = {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
        return {"task": model, "inputs": prompt, "parameters": parameters}

    def read(self, chunk: Chunk, said: Said) -> str:
        """Note what an event says; return its text, empty if it has none."""
        said.version(chunk.get("adapter"))
        said.finished = said.finished or chunk.get("generated_text") is not None
        if details := chunk.get("details"):
            said.tokens = details.get("generated_tokens")
            said.prompt_tokens = details.get("prompt_tokens")
            said.cached_tokens = details.get("cached_tokens") or 0
        return str((chunk.get("token") or {}).get("text") or "")


DIALECTS: dict[str, Dialect] = {
    "completions": Completions(),
    "chat": Chat(),
    "generate": Generate(),
}


def _openai(output_tokens: int) -> dict[str, Any]:
    return {
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _choice(chunk: Chunk, said: Said) -> Mapping[str, Any]:
    """Note what every event of OpenAI's routes may say; return its choice, empty if it has none."""
    if usage := chunk.get("usage"):
        said.usage(usage)
    if extension := chunk.get("oneplusn"):
        said.version(extension.get("adapter"))
    choices = chunk.get("choices") or [{}]
    choice: Mapping[str, Any] = choices[0]
    said.finished = said.finished or bool(choice.get("finish_reason"))
    return choice

"""POST /v1/completions, as OpenAI's clients speak it; `model` is the base or a task."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request, Response

from oneplusn.server.batches import Batch
from oneplusn.server.inference import Delta, Inference, Job
from oneplusn.server.messages import TokenOutput
from oneplusn.server.offload import offload
from oneplusn.server.routes.common import (
    FINGERPRINT,
    INFERS,
    STREAMS,
    PrincipalDep,
    ServerDep,
    asked,
    extension,
    finite,
    full_extension,
    headers,
    note,
    open_batch,
    seeds,
    usage,
)
from oneplusn.server.schemas_openai import CompletionRequest
from oneplusn.server.state import Server
from oneplusn.server.text import Tokenizer
from oneplusn.server.web import Json, JsonRoute, stream_events, until_disconnect

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post("/v1/completions", responses={**INFERS, **STREAMS})
async def completions(
    request: Request, body: CompletionRequest, server: ServerDep, who: PrincipalDep
) -> Response:
    """Continue one prompt, or several in one batch."""
    inference = server.inference
    prompts = await _encode(inference, body)
    spec = await offload(lambda: body.grammar, body.response_format, body.structured_outputs)
    grammar = None if spec is None else await server.grammars.prove(spec)
    batch = open_batch(request, server, who, _jobs(server, body, prompts, grammar), body)
    echoes = _echoes(inference, body, prompts)
    head = {
        "id": f"cmpl-{batch.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": FINGERPRINT,
    }
    if body.stream:
        events = _events(request, server, body, batch, head, echoes)
        return await stream_events(
            request, events, done=True, headers=lambda: headers(batch.targets)
        )
    await until_disconnect(request, batch.run())
    note(request, batch.generations)
    choices = [
        {
            "index": index,
            "text": echo + generation.text,
            "logprobs": _logprobs(inference.tokenizer, body, generation.outputs),
            "finish_reason": generation.finish_reason,
            "stop_reason": generation.stop_reason,
        }
        for index, (echo, generation) in enumerate(zip(echoes, batch.generations, strict=True))
    ]
    content = {
        **head,
        "choices": choices,
        "usage": usage(batch.generations, choices=body.n),
        "oneplusn": await full_extension(server, batch.targets[0], body.oneplusn),
    }
    return Json(content, headers=headers(batch.targets))


async def _encode(inference: Inference, body: CompletionRequest) -> list[list[int]]:
    """Turn the prompts that are texts into tokens, too."""
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    encoded = await inference.encode(texts, param="prompt", add_special=body.add_special_tokens)
    rest = iter(encoded)
    return [next(rest) if isinstance(prompt, str) else prompt for prompt in body.prompts]


def _jobs(
    server: Server, body: CompletionRequest, prompts: list[list[int]], grammar: str | None
) -> list[Job]:
    """Build `n` jobs per prompt, a prompt's own ones side by side."""
    choices = seeds(body.seed, body.n)
    what = asked(body, server.settings.base_name)
    return [
        Job(
            what,
            tokens,
            body,
            body.max_tokens,
            seed,
            body.logprobs,
            grammar,
            alias=True,
            task_param="model" if isinstance(what, str) else "oneplusn.blend",
        )
        for tokens in prompts
        for seed in choices
    ]


async def _events(
    request: Request,
    server: Server,
    body: CompletionRequest,
    batch: Batch,
    head: dict[str, Any],
    echoes: list[str],
) -> AsyncGenerator[Iterator[dict[str, Any]], None]:
    with batch:
        target = batch.targets[0]
        head["oneplusn"] = await full_extension(server, target, body.oneplusn)
        later = {**head, "oneplusn": extension(target)}
        unsent = dict(enumerate(echoes))
        chunks = _Chunks(server.inference.tokenizer, body, batch, head, later, unsent)
        try:
            async for pieces in batch.deltas():
                yield chunks.of(pieces)
            if body.include_usage:
                counts = usage(batch.generations, choices=body.n)
                yield iter([{**later, "choices": [], "usage": counts}])
        finally:
            note(request, batch.generations)


@dataclass(slots=True)
class _Chunks:
    """What a stream says of the pieces of its answers.

    Attributes:
        head: What the next chunk begins with: the first one tells of all that was asked for.
        later: What the others begin with.
        unsent: What stands before answers that have not begun.
        offsets: Where the next token begins in each answer.
    """

    tokenizer: Tokenizer
    body: CompletionRequest
    batch: Batch
    head: dict[str, Any]
    later: dict[str, Any]
    unsent: dict[int, str]
    offsets: Counter[int] = field(default_factory=Counter)

    def of(self, pieces: Iterator[tuple[int, Delta]]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of the pieces of one step."""
        generations = self.batch.generations
        for index, delta in pieces:
            text = self.unsent.pop(index, "") + delta.text
            logprobs = _logprobs(self.tokenizer, self.body, [delta.output], self.offsets[index])
            if logprobs:
                self.offsets[index] += sum(map(len, logprobs["tokens"]))
            if text or logprobs or delta.finish_reason:
                choice = _choice(index, text, logprobs, delta.finish_reason)
                if delta.finish_reason is not None:
                    choice["stop_reason"] = generations[index].stop_reason
                chunk = {**self.head, "choices": [choice]}
                self.head = self.later
                if self.body.include_usage:
                    now = usage(generations, choices=self.body.n)
                    chunk["usage"] = now if self.body.continuous_usage else None
                yield chunk


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _echoes(
    inference: Inference, body: CompletionRequest, prompts: Sequence[list[int]]
) -> list[str]:
    """Return what stands before each choice: its prompt if `echo` is set, else nothing."""
    texts = [
        (prompt if isinstance(prompt, str) else inference.tokenizer.decode(tokens))
        if body.echo
        else ""
        for prompt, tokens in zip(body.prompts, prompts, strict=True)
    ]
    return [text for text in texts for _ in range(body.n)]


def _logprobs(
    tokenizer: Tokenizer, body: CompletionRequest, outputs: Sequence[TokenOutput], offset: int = 0
) -> dict[str, Any] | None:
    """List tokens with their log-probabilities, if they were asked for.

    `offset` is where the first of them begins in the answer.
    """
    if body.logprobs is None:
        return None
    known = [output for output in outputs if output.token is not None]
    tokens = [tokenizer.decode([output.token]) for output in known if output.token is not None]
    return {
        "tokens": tokens,
        "token_logprobs": [finite(output.logprob) for output in known],
        "top_logprobs": [
            {tokenizer.decode([token]): finite(logprob) for token, logprob in output.top or []}
            for output in known
        ],
        "text_offset": list(accumulate(map(len, tokens), initial=offset))[:-1],
    }

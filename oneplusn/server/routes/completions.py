"""POST /v1/completions, as OpenAI's clients speak it; `model` is the base or a task."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from oneplusn.server.inference import Batch, Inference, Job
from oneplusn.server.messages import TokenOutput
from oneplusn.server.routes.common import ServerDep, extension, finite, headers, note, seeds, usage
from oneplusn.server.schemas import CompletionRequest
from oneplusn.server.text import Tokenizer
from oneplusn.server.web import JsonRoute, stream_events, until_disconnect

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest, server: ServerDep) -> Response:
    """Continue one prompt, or several in one batch."""
    inference = server.inference
    prompts = [await _encode(inference, prompt) for prompt in body.prompts]
    batch = Batch(inference, _jobs(inference, body, prompts))
    echoes = _echoes(inference, body, prompts)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        events = _events(request, inference, body, batch, head, echoes)
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
        }
        for index, (echo, generation) in enumerate(zip(echoes, batch.generations, strict=True))
    ]
    content = {
        **head,
        "choices": choices,
        "usage": usage(batch.generations, choices=body.n),
        "oneplusn": extension(batch.targets[0]),
    }
    return JSONResponse(content, headers=headers(batch.targets))


async def _encode(inference: Inference, prompt: str | list[int]) -> list[int]:
    return await inference.encode(prompt) if isinstance(prompt, str) else prompt


def _jobs(inference: Inference, body: CompletionRequest, prompts: list[list[int]]) -> list[Job]:
    """Build `n` jobs per prompt, a prompt's own ones side by side."""
    choices = seeds(body.seed, body.n)
    rooms = [inference.room(tokens, body.max_tokens, param="prompt") for tokens in prompts]
    return [
        Job(
            body.model,
            tokens,
            body.sampling(
                max_tokens=room,
                temperature=body.temperature,
                seed=seed,
                logprobs=body.logprobs,
            ),
            tuple(body.stop),
        )
        for tokens, room in zip(prompts, rooms, strict=True)
        for seed in choices
    ]


async def _events(
    request: Request,
    inference: Inference,
    body: CompletionRequest,
    batch: Batch,
    head: dict[str, Any],
    echoes: list[str],
) -> AsyncGenerator[dict[str, Any], None]:
    with batch:
        head = {
            **head,
            "oneplusn": extension(batch.targets[0]),
            **({"usage": None} if body.include_usage else {}),
        }
        unsent = dict(enumerate(echoes))
        try:
            async for index, delta in batch.deltas():
                text = unsent.pop(index, "") + delta.text
                logprobs = _logprobs(inference.tokenizer, body, [delta.output])
                if text or logprobs or delta.finish_reason:
                    choice = _choice(index, text, logprobs, delta.finish_reason)
                    yield {**head, "choices": [choice]}
            if body.include_usage:
                counts = usage(batch.generations, choices=body.n)
                yield {**head, "choices": [], "usage": counts}
        finally:
            note(request, batch.generations)


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
    tokenizer: Tokenizer, body: CompletionRequest, outputs: Sequence[TokenOutput]
) -> dict[str, Any] | None:
    """List tokens with their log-probabilities, if they were asked for."""
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
        "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
    }

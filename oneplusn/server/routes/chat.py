"""POST /v1/chat/completions, as OpenAI's clients speak it; `model` is the base or a task."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from oneplusn.server.inference import Batch, Inference, Job
from oneplusn.server.messages import TokenOutput
from oneplusn.server.routes.common import ServerDep, extension, finite, headers, note, seeds, usage
from oneplusn.server.schemas import ChatRequest
from oneplusn.server.text import Tokenizer
from oneplusn.server.web import JsonRoute, stream_events, until_disconnect

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest, server: ServerDep) -> Response:
    """Answer a conversation."""
    inference = server.inference
    batch = Batch(inference, await _jobs(inference, body))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        events = _events(request, inference, body, batch, head)
        return await stream_events(
            request, events, done=True, headers=lambda: headers(batch.targets)
        )
    await until_disconnect(request, batch.run())
    note(request, batch.generations)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": generation.text, "refusal": None},
            "logprobs": _logprobs(inference.tokenizer, body, generation.outputs),
            "finish_reason": generation.finish_reason,
        }
        for index, generation in enumerate(batch.generations)
    ]
    content = {
        **head,
        "object": "chat.completion",
        "choices": choices,
        "usage": usage(batch.generations, choices=body.n),
        "oneplusn": extension(batch.targets[0]),
    }
    return JSONResponse(content, headers=headers(batch.targets))


async def _jobs(inference: Inference, body: ChatRequest) -> list[Job]:
    """Build one job per choice."""
    messages = [{"role": _role(m.role), "content": m.text} for m in body.messages]
    tokens = await inference.encode_chat(messages)
    asked = body.max_completion_tokens or body.max_tokens
    room = inference.room(tokens, asked, param="messages")
    samplings = [
        body.sampling(
            max_tokens=room,
            temperature=body.temperature,
            seed=seed,
            logprobs=body.num_logprobs,
        )
        for seed in seeds(body.seed, body.n)
    ]
    return [Job(body.model, tokens, sampling, tuple(body.stop)) for sampling in samplings]


async def _events(
    request: Request,
    inference: Inference,
    body: ChatRequest,
    batch: Batch,
    head: dict[str, Any],
) -> AsyncGenerator[dict[str, Any], None]:
    begun = set[int]()
    with batch:
        head = {
            **head,
            "object": "chat.completion.chunk",
            "oneplusn": extension(batch.targets[0]),
            **({"usage": None} if body.include_usage else {}),
        }
        try:
            async for index, delta in batch.deltas():
                if index not in begun:
                    begun.add(index)
                    yield {**head, "choices": [_chunk(index, {"role": "assistant", "content": ""})]}
                logprobs = _logprobs(inference.tokenizer, body, [delta.output])
                if delta.text or logprobs:
                    content = {"content": delta.text}
                    yield {**head, "choices": [_chunk(index, content, logprobs=logprobs)]}
                if delta.finish_reason is not None:
                    yield {**head, "choices": [_chunk(index, {}, finish=delta.finish_reason)]}
            if body.include_usage:
                counts = usage(batch.generations, choices=body.n)
                yield {**head, "choices": [], "usage": counts}
        finally:
            note(request, batch.generations)


def _chunk(
    index: int,
    delta: dict[str, str],
    *,
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _role(role: str) -> str:
    """Name a role as chat templates know it."""
    return "system" if role == "developer" else role


def _logprobs(
    tokenizer: Tokenizer, body: ChatRequest, outputs: Sequence[TokenOutput]
) -> dict[str, Any] | None:
    """List tokens with their log-probabilities, if they were asked for."""
    if not body.logprobs:
        return None
    listed = [
        {
            **_logprob(tokenizer, output.token, output.logprob),
            "top_logprobs": [_logprob(tokenizer, *top) for top in output.top or []],
        }
        for output in outputs
        if output.token is not None and output.logprob is not None
    ]
    return {"content": listed, "refusal": None}


def _logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}

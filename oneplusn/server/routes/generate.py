"""POST /generate and /generate_stream: text in, text out, a task for every input."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from oneplusn.errors import InvalidRequest
from oneplusn.server.inference import Batch, Generation, Inference, Job
from oneplusn.server.messages import TokenOutput
from oneplusn.server.routes.common import ServerDep, finite, headers, note, seeds
from oneplusn.server.schemas import GenerateRequest
from oneplusn.server.web import JsonRoute, stream_events, until_disconnect

router = APIRouter(route_class=JsonRoute, tags=["generate"])


@router.post("/generate")
async def generate(request: Request, body: GenerateRequest, server: ServerDep) -> Response:
    """Generate text for one input, or for a list of them in one batch."""
    inference = server.inference
    batch = Batch(inference, await _jobs(inference, body))
    await until_disconnect(request, batch.run())
    note(request, batch.generations)
    answers = [
        _answer(inference, body, text, generation)
        for (text, _), generation in zip(body.pairs, batch.generations, strict=True)
    ]
    content = answers if isinstance(body.inputs, list) else answers[0]
    return JSONResponse(content, headers=headers(batch.targets))


@router.post("/generate_stream")
async def generate_stream(request: Request, body: GenerateRequest, server: ServerDep) -> Response:
    """Generate text for one input, token by token, as server-sent events."""
    if isinstance(body.inputs, list):
        msg = f"inputs lists {len(body.inputs)} texts; a stream takes one: send it as a string"
        raise InvalidRequest(msg, param="inputs")
    inference = server.inference
    batch = Batch(inference, await _jobs(inference, body))
    events = _events(request, inference, body, batch)
    return await stream_events(request, events, done=False, headers=lambda: headers(batch.targets))


async def _jobs(inference: Inference, body: GenerateRequest) -> list[Job]:
    """Build one job per input."""
    wanted = body.parameters
    prompts = [await inference.encode(text) for text, _ in body.pairs]
    (seed,) = seeds(wanted.seed, 1)
    return [
        Job(
            task,
            tokens,
            wanted.sampling(
                max_tokens=inference.room(tokens, wanted.max_new_tokens, param="inputs"),
                temperature=wanted.temperature,
                seed=seed,
                logprobs=wanted.top_n_tokens if wanted.details else None,
            ),
            tuple(wanted.stop),
            param="task",
        )
        for (_, task), tokens in zip(body.pairs, prompts, strict=True)
    ]


async def _events(
    request: Request, inference: Inference, body: GenerateRequest, batch: Batch
) -> AsyncGenerator[dict[str, Any], None]:
    ((text, _),) = body.pairs
    with batch:
        (generation,) = batch.generations
        try:
            async for delta in inference.deltas(generation):
                last = delta.finish_reason is not None
                answer = _answer(inference, body, text, generation) if last else {}
                yield {
                    "index": len(generation.outputs) - 1,
                    "token": {**_token(inference, delta.output), "text": delta.text},
                    "generated_text": answer.get("generated_text"),
                    "task": generation.target.asked,
                    "adapter": generation.target.adapter,
                    "details": answer.get("details"),
                }
        finally:
            note(request, [generation])


def _answer(
    inference: Inference, body: GenerateRequest, text: str, generation: Generation
) -> dict[str, Any]:
    job = generation.job
    details: dict[str, Any] = {
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(job.tokens),
        "generated_tokens": len(generation.outputs),
        "cached_tokens": generation.cached_tokens,
        "seed": job.sampling.seed,
    }
    if body.parameters.details:
        details["tokens"] = [_token(inference, output) for output in generation.outputs]
    full = body.parameters.return_full_text
    return {
        "generated_text": text + generation.text if full else generation.text,
        "task": generation.target.asked,
        "adapter": generation.target.adapter,
        "details": details,
    }


def _token(inference: Inference, output: TokenOutput) -> dict[str, Any]:
    """Describe one token, with the likeliest in its place if they were asked for."""
    token: dict[str, Any] = {
        "id": output.token,
        "text": "" if output.token is None else inference.tokenizer.decode([output.token]),
        "logprob": finite(output.logprob),
    }
    if output.top:
        token["top"] = [
            {"id": other, "text": inference.tokenizer.decode([other]), "logprob": finite(logprob)}
            for other, logprob in output.top
        ]
    return token

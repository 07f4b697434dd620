"""POST /generate and /generate_stream: text in, text out, a task for every input.

`POST /` is the same for clients of text-generation-inference and LoRAX.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from oneplusn.errors import InvalidRequest
from oneplusn.server.auth import Principal
from oneplusn.server.batches import Batch
from oneplusn.server.inference import Delta, Generation, Inference, Job
from oneplusn.server.messages import TokenOutput
from oneplusn.server.offload import offload
from oneplusn.server.routes.common import (
    INFERS,
    STREAMS,
    PrincipalDep,
    ServerDep,
    finite,
    headers,
    note,
    open_batch,
    seeds,
)
from oneplusn.server.schemas_generate import (
    GenerateParameters,
    GenerateRequest,
    StreamableGenerateRequest,
)
from oneplusn.server.state import Server
from oneplusn.server.web import Json, JsonRoute, stream_events, until_disconnect

router = APIRouter(route_class=JsonRoute, tags=["generate"])


@router.post("/generate", responses=INFERS)
async def generate(
    request: Request, body: GenerateRequest, server: ServerDep, who: PrincipalDep
) -> Response:
    """Generate text for one input, or for a list of them in one batch."""
    batch = await _run(request, body, server, who)
    answers = _answers(server.inference, body, batch)
    content = answers if isinstance(body.inputs, list) else answers[0]
    return Json(content, headers=headers(batch.targets))


@router.post("/generate_stream", responses={**INFERS, **STREAMS}, response_class=Response)
async def generate_stream(
    request: Request, body: GenerateRequest, server: ServerDep, who: PrincipalDep
) -> Response:
    """Generate text for one input, token by token, as server-sent events."""
    return await _stream(request, body, server, who)


@router.post("/", responses={**INFERS, **STREAMS})
async def generate_compatibly(
    request: Request, body: StreamableGenerateRequest, server: ServerDep, who: PrincipalDep
) -> Response:
    """Do the same with `stream` in the body; one input, too, is answered by a list."""
    if body.stream:
        return await _stream(request, body, server, who)
    batch = await _run(request, body, server, who)
    answers = _answers(server.inference, body, batch)
    return Json(answers, headers=headers(batch.targets))


async def _run(request: Request, body: GenerateRequest, server: Server, who: Principal) -> Batch:
    """Generate all answers to their ends."""
    batch = open_batch(request, server, who, await _jobs(server, body))
    await until_disconnect(request, batch.run())
    note(request, batch.generations)
    return batch


async def _stream(
    request: Request, body: GenerateRequest, server: Server, who: Principal
) -> Response:
    if isinstance(body.inputs, list):
        msg = f"inputs lists {len(body.inputs)} texts; a stream takes one: send it as a string"
        raise InvalidRequest(msg, param="inputs")
    batch = open_batch(request, server, who, await _jobs(server, body))
    events = _events(request, server, body, batch)
    return await stream_events(request, events, done=False, headers=lambda: headers(batch.targets))


async def _jobs(server: Server, body: GenerateRequest) -> list[Job]:
    """Build one job per input."""
    wanted = body.parameters
    prompts = await server.inference.encode([text for text, _ in body.pairs], param="inputs")
    form = await offload(lambda: wanted.form, wanted)
    grammar = None if form is None else await server.grammars.prove(form)
    (seed,) = seeds(wanted.seed, 1)
    return [
        Job(
            task,
            tokens if wanted.truncate is None else tokens[-wanted.truncate :],
            wanted,
            wanted.max_new_tokens,
            seed,
            wanted.num_logprobs,
            grammar,
            alias=wanted.adapter_id is not None,
            task_param="task" if wanted.adapter_id is None else "parameters.adapter_id",
            prompt_param="inputs",
        )
        for (_, task), tokens in zip(body.pairs, prompts, strict=True)
    ]


async def _events(
    request: Request, server: Server, body: GenerateRequest, batch: Batch
) -> AsyncGenerator[Iterator[dict[str, Any]], None]:
    ((text, _),) = body.pairs
    with batch:
        (generation,) = batch.generations
        event = partial(_event, server.inference, body, text, generation)
        try:
            async for pieces in batch.deltas():
                yield (event(delta) for _, delta in pieces)
        finally:
            note(request, [generation])


def _event(
    inference: Inference, body: GenerateRequest, text: str, generation: Generation, delta: Delta
) -> dict[str, Any]:
    wanted = body.parameters
    last = delta.finish_reason is not None
    event: dict[str, Any] = {
        "index": len(generation.outputs) - 1,
        "token": {**_token(inference, delta.output, wanted), "text": delta.text},
        "generated_text": _full_text(body, text, generation) if last else None,
        "task": generation.target.asked,
        "adapter": generation.target.adapter,
        "details": _details(generation) if last else None,
    }
    if wanted.top_n_tokens:
        event["top_tokens"] = _top(inference, delta.output, wanted.top_n_tokens)
    return event


def _answers(inference: Inference, body: GenerateRequest, batch: Batch) -> list[dict[str, Any]]:
    return [
        {
            "generated_text": _full_text(body, text, generation),
            "task": generation.target.asked,
            "adapter": generation.target.adapter,
            "details": {**_details(generation), **_listed(inference, body.parameters, generation)},
        }
        for (text, _), generation in zip(body.pairs, batch.generations, strict=True)
    ]


def _full_text(body: GenerateRequest, text: str, generation: Generation) -> str:
    return text + generation.text if body.parameters.return_full_text else generation.text


def _details(generation: Generation) -> dict[str, Any]:
    return {
        "finish_reason": _finish_reason(generation),
        "prompt_tokens": len(generation.job.tokens),
        "generated_tokens": len(generation.outputs),
        "cached_tokens": generation.cached_tokens,
        "seed": generation.job.seed,
    }


def _finish_reason(generation: Generation) -> str | None:
    """Say why it ended in text-generation-inference's words."""
    if generation.finish_reason != "stop":
        return generation.finish_reason
    return "eos_token" if generation.stop_reason is None else "stop_sequence"


def _listed(
    inference: Inference, wanted: GenerateParameters, generation: Generation
) -> dict[str, Any]:
    """List the tokens, if they were asked for."""
    outputs = generation.outputs if wanted.details else []
    listed: dict[str, Any] = {
        "prefill": [],
        "tokens": [_token(inference, output, wanted) for output in outputs],
    }
    if wanted.top_n_tokens:
        listed["top_tokens"] = [_top(inference, output, wanted.top_n_tokens) for output in outputs]
    return listed


def _token(inference: Inference, output: TokenOutput, wanted: GenerateParameters) -> dict[str, Any]:
    """Describe one token, with the likeliest in its place if they were asked for."""
    token = _describe(inference, output.token, output.logprob)
    if wanted.return_k_alternatives:
        token["alternative_tokens"] = _top(inference, output, wanted.return_k_alternatives)
    return token


def _top(inference: Inference, output: TokenOutput, count: int) -> list[dict[str, Any]]:
    return [_describe(inference, token, logprob) for token, logprob in (output.top or [])[:count]]


def _describe(inference: Inference, token: int | None, logprob: float | None) -> dict[str, Any]:
    if token is None:
        return {"id": None, "text": "", "logprob": None, "special": True}
    tokenizer = inference.tokenizer
    return {
        "id": token,
        "text": tokenizer.decode([token], skip_special=False),
        "logprob": finite(logprob),
        "special": tokenizer.is_special(token),
    }

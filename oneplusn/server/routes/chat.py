"""POST /v1/chat/completions, as OpenAI's clients speak it; `model` is the base or a task."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from oneplusn.server.batches import Batch
from oneplusn.server.inference import Delta, Job
from oneplusn.server.messages import TokenOutput
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
from oneplusn.server.routes.tool_answers import (
    AnswerStream,
    finish_reason,
    message,
    prove_grammar,
    tool_plan,
    with_marks,
)
from oneplusn.server.schemas_openai import ChatRequest
from oneplusn.server.state import Server
from oneplusn.server.text import Tokenizer
from oneplusn.server.toolspecs import ToolPlan
from oneplusn.server.web import Json, JsonRoute, stream_events, until_disconnect

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post("/v1/chat/completions", responses={**INFERS, **STREAMS})
async def chat_completions(
    request: Request, body: ChatRequest, server: ServerDep, who: PrincipalDep
) -> Response:
    """Answer a conversation."""
    tokenizer = server.inference.tokenizer
    plan = await tool_plan(server, body)
    batch = open_batch(request, server, who, await _jobs(server, body, plan), body)
    head = {
        "id": f"chatcmpl-{batch.request_id}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": FINGERPRINT,
    }
    if body.stream:
        events = _events(request, server, body, plan, batch, head)
        return await stream_events(
            request, events, done=True, headers=lambda: headers(batch.targets)
        )
    await until_disconnect(request, batch.run())
    note(request, batch.generations)
    messages = [message(plan, generation.text) for generation in batch.generations]
    choices = [
        {
            "index": index,
            "message": answer,
            "logprobs": _logprobs(tokenizer, body, generation.outputs),
            "finish_reason": finish_reason(
                generation.finish_reason, has_calls="tool_calls" in answer
            ),
            "stop_reason": generation.stop_reason,
        }
        for index, (answer, generation) in enumerate(zip(messages, batch.generations, strict=True))
    ]
    content = {
        **head,
        "object": "chat.completion",
        "choices": choices,
        "usage": usage(batch.generations, choices=body.n),
        "oneplusn": await full_extension(server, batch.targets[0], body.oneplusn),
    }
    return Json(content, headers=headers(batch.targets))


async def _jobs(server: Server, body: ChatRequest, plan: ToolPlan | None) -> list[Job]:
    """Build one job per choice."""
    messages = [message.for_template() for message in body.messages]
    switches = {name: value is True for name, value in body.chat_template_kwargs.items()}
    tools = None if plan is None else plan.shown
    tokens = await server.inference.encode_chat(messages, tools=tools, switches=switches)
    grammar = await prove_grammar(server, body, plan)
    what = asked(body, server.settings.base_name)
    wanted = with_marks(server, body, plan)
    return [
        Job(
            what,
            tokens,
            wanted,
            body.limit,
            seed,
            body.num_logprobs,
            grammar,
            alias=True,
            task_param="model" if isinstance(what, str) else "oneplusn.blend",
            prompt_param="messages",
        )
        for seed in seeds(body.seed, body.n)
    ]


async def _events(
    request: Request,
    server: Server,
    body: ChatRequest,
    plan: ToolPlan | None,
    batch: Batch,
    head: dict[str, Any],
) -> AsyncGenerator[Iterator[dict[str, Any]], None]:
    with batch:
        target = batch.targets[0]
        head |= {"object": "chat.completion.chunk", "oneplusn": extension(target)}
        opening = await full_extension(server, target, body.oneplusn)
        chunks = _Chunks(server.inference.tokenizer, body, plan, batch, head, opening)
        try:
            async for pieces in batch.deltas():
                yield chunks.of(pieces)
            if body.include_usage:
                counts = usage(batch.generations, choices=body.n)
                yield iter([{**head, "choices": [], "usage": counts}])
        finally:
            note(request, batch.generations)


@dataclass(slots=True)
class _Chunks:
    """What a stream says of the pieces of its answers.

    Attributes:
        head: What all chunks have in common.
        opening: What the first one says of the versions that answer.
        begun: The answers that have begun.
    """

    tokenizer: Tokenizer
    body: ChatRequest
    plan: ToolPlan | None
    batch: Batch
    head: dict[str, Any]
    opening: dict[str, Any]
    begun: dict[int, AnswerStream] = field(default_factory=dict)

    def of(self, pieces: Iterator[tuple[int, Delta]]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of the pieces of one step."""
        for index, delta in pieces:
            if self.body.include_usage:
                now = usage(self.batch.generations, choices=self.body.n)
                self.head["usage"] = now if self.body.continuous_usage else None
            if index not in self.begun:
                yield self._first(index)
                self.begun[index] = AnswerStream(self.plan)
            yield from self._piece(index, delta)

    def _first(self, index: int) -> dict[str, Any]:
        told = {} if self.begun else {"oneplusn": self.opening}
        chunk = _chunk(index, {"role": "assistant", "content": ""})
        return {**self.head, "choices": [chunk], **told}

    def _piece(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        head, answer, reason = self.head, self.begun[index], delta.finish_reason
        logprobs = _logprobs(self.tokenizer, self.body, [delta.output])
        changes = answer.push(delta.text, is_last=reason is not None)
        for change in changes or ([{"content": ""}] if logprobs else []):
            yield {**head, "choices": [_chunk(index, change, logprobs=logprobs)]}
            logprobs = None
        if reason is not None:
            reason = finish_reason(reason, has_calls=answer.has_calls)
            stop = self.batch.generations[index].stop_reason
            yield {**head, "choices": [_last_chunk(index, reason, stop)]}


def _chunk(
    index: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _last_chunk(index: int, finish: str | None, stop: str | int | None) -> dict[str, Any]:
    return {**_chunk(index, {}), "finish_reason": finish, "stop_reason": stop}


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

"""What several routes need: the server, who asks, a request's record, seeds, counts of tokens."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Request

from oneplusn import __version__
from oneplusn.errors import InvalidRequest
from oneplusn.server.auth import Principal, principal
from oneplusn.server.batches import Batch
from oneplusn.server.gates import read_gates
from oneplusn.server.inference import Generation, Job
from oneplusn.server.openapi import ERROR_RESPONSE, EVENT_RESPONSE
from oneplusn.server.schemas_openai import Extension, OpenAIRequest
from oneplusn.server.state import Server
from oneplusn.server.targets import Asked, Target
from oneplusn.server.web import adopt_request_id, record_of

_INT64 = 1 << 63
ADAPTER_HEADER = "x-oneplusn-adapter"
FINGERPRINT = f"oneplusn-{__version__}"


def _server(request: Request) -> Server:
    """Return the server; what computes or changes something is refused while it is not ready."""
    server: Server = request.app.state.server
    if request.method not in ("GET", "HEAD"):
        server.admit()
    return server


ServerDep = Annotated[Server, Depends(_server)]
PrincipalDep = Annotated[Principal, Depends(principal)]


def fails(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document the statuses of errors that a route may answer with, besides those of all routes."""
    return dict.fromkeys(statuses, ERROR_RESPONSE)


_BODY = (400, 408, 413, 415)
READS_BODY = fails(*_BODY)
INFERS = fails(*_BODY, 404, 429, 499, 504)
STREAMS: dict[int | str, dict[str, Any]] = {200: EVENT_RESPONSE}


def seeds(given: int | None, count: int) -> list[int]:
    """Return one seed per choice: consecutive ones, from a random one if none is given."""
    first = secrets.randbits(63) if given is None else given
    return [(first + index + _INT64) % (2 * _INT64) - _INT64 for index in range(count)]


def asked(body: OpenAIRequest, base_name: str) -> Asked:
    """Return what shall answer: `model`, or the blend beside it.

    Raises:
        InvalidRequest: They contradict each other.
    """
    blend = body.oneplusn.blend
    if blend is None:
        return body.model
    if body.model != base_name:
        msg = f"model {body.model!r} contradicts the blend; name the base there, {base_name!r}"
        raise InvalidRequest(msg, param="oneplusn.blend")
    return blend


def open_batch(
    request: Request,
    server: Server,
    who: Principal,
    jobs: Sequence[Job],
    body: OpenAIRequest | None = None,
) -> Batch:
    """Put the jobs of a request together, under its id and within its tenant's cache."""
    request_id = adopt_request_id(request, body.request_id if body else None)
    salt = f"{who.tenant}:{body.cache_salt}" if body and body.cache_salt else who.tenant
    return Batch(server.inference, jobs, request_id=request_id, salt=salt)


def headers(targets: Sequence[Target]) -> dict[str, str]:
    """Name the adapter versions that an answer comes from."""
    labels = dict.fromkeys(label for target in targets for label in target.versions)
    return {ADAPTER_HEADER: ",".join(labels)} if labels else {}


def note(request: Request, generations: Sequence[Generation]) -> None:
    """Put into the log line of a request what was generated for it."""
    record = record_of(request)
    targets = [generation.target for generation in generations]
    record.task = ",".join(dict.fromkeys(target.label for target in targets))
    record.adapter = headers(targets).get(ADAPTER_HEADER)
    record.prompt_tokens = sum(len(generation.job.tokens) for generation in generations)
    record.completion_tokens = sum(len(generation.outputs) for generation in generations)
    reasons = dict.fromkeys(generation.ending for generation in generations)
    record.finish_reason = ",".join(reasons)
    firsts = [g.ttft_seconds for g in generations if g.ttft_seconds is not None]
    record.ttft_ms = min(firsts) * 1000 if firsts else None
    queued = [g.queued_seconds for g in generations if g.queued_seconds is not None]
    record.queue_ms = min(queued) * 1000 if queued else None


def usage(generations: Sequence[Generation], *, choices: int) -> dict[str, Any]:
    """Count tokens as OpenAI does: a prompt once, however many choices it has."""
    first_of_each = generations[::choices]
    prompt_tokens = sum(len(generation.job.tokens) for generation in first_of_each)
    completion_tokens = sum(len(generation.outputs) for generation in generations)
    cached = sum(generation.cached_tokens for generation in first_of_each)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finite(logprob: float | None) -> float | None:
    """Write a log-probability as JSON can: a token that is impossible gets OpenAI's -9999."""
    return None if logprob is None else max(logprob, -9999.0)


def extension(target: Target) -> dict[str, Any]:
    """Say under our own key which task and version an answer comes from."""
    return {"task": target.asked, "adapter": target.adapter}


async def full_extension(server: Server, target: Target, wanted: Extension) -> dict[str, Any]:
    """Say it with all that the request asked to know."""
    told = extension(target)
    if wanted.return_version:
        told["versions"] = [
            {"adapter": v.adapter, "version": v.number, "digest": v.digest}
            for v in target.versions.values()
        ]
    if wanted.return_gates:
        told["gates"] = await asyncio.to_thread(_gates, server, target)
    return told


def _gates(server: Server, target: Target) -> list[dict[str, Any]]:
    return [
        {
            "task": part.ref.task,
            "adapter": part.version.label,
            "weight": part.ref.weight,
            "experts": gates.experts,
            "modules": gates.modules,
        }
        for part in target.parts
        for gates in [read_gates(server.registry.blob(part.version.digest), part.ref.task)]
    ]

"""What several routes need: the server, a request's record, seeds, counts of tokens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Request

from oneplusn.server.inference import Generation, Target
from oneplusn.server.state import Server
from oneplusn.server.web import record_of

_INT64 = 1 << 63
ADAPTER_HEADER = "x-oneplusn-adapter"


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerDep = Annotated[Server, Depends(_server)]


def seeds(given: int | None, count: int) -> list[int]:
    """Return one seed per choice: consecutive ones, from a random one if none is given."""
    first = secrets.randbits(63) if given is None else given
    return [(first + index + _INT64) % (2 * _INT64) - _INT64 for index in range(count)]


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
    reasons = dict.fromkeys(generation.finish_reason or "abort" for generation in generations)
    record.finish_reason = ",".join(reasons)
    firsts = [g.ttft_seconds for g in generations if g.ttft_seconds is not None]
    record.ttft_ms = min(firsts) * 1000 if firsts else None


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

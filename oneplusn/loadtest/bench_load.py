"""Send one case to a server: a closed loop of streams, greedy, to the last token."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from oneplusn.loadtest.bench_cases import BASE_NAME, Work
from oneplusn.loadtest.dialects import Dialect
from oneplusn.loadtest.drive import Driver, Limits, Outcome
from oneplusn.loadtest.figures import figures
from oneplusn.loadtest.stream import LoadFailed
from oneplusn.loadtest.transport import reach
from oneplusn.loadtest.workload import Planned

FIRST_WORD = 3
"""The lowest token id that is no special token."""
ANSWER_LIMIT_S = 600.0
REPEAT_BUDGET_S = 30.0
"""Seconds of a case after which it is not repeated any more: slow runs are long ones."""
FIGURES = (
    "output_throughput",
    "p50_ttft_ms",
    "p99_ttft_ms",
    "p50_itl_ms",
    "p99_itl_ms",
    "tokens_per_event",
    "client_cpu_share",
)
"""What is kept of a run, under the load tester's names."""


def measure(address: str, route: Dialect, work: Work, case: str) -> dict[str, Any]:
    """Warm up, run a case several times, and return the run of median throughput.

    Raises:
        LoadFailed: A request failed, or the server did other work than was asked for.
    """
    asked = work.asked(case)
    load_before = os.getloadavg()[0]
    send(address, route, work, asked, len(asked))
    runs, begin = list[dict[str, Any]](), time.perf_counter()
    while len(runs) < work.repeats and (not runs or time.perf_counter() - begin < REPEAT_BUDGET_S):
        runs.append(kept(send(address, route, work, asked, work.requests(case)), work))
    return {**median_run(runs), "runs": len(runs), "load_before": round(load_before, 2)}


def first_token(address: str, route: Dialect, work: Work) -> float:
    """Ask the base for its first tokens; return when the first one came, on the clock."""
    outcome = send(address, route, work, [BASE_NAME], 1)
    kept(outcome, work)
    answer = outcome.records[0].answer
    assert answer is not None
    return answer.times[0]


def send(address: str, route: Dialect, work: Work, asked: Sequence[str], requests: int) -> Outcome:
    """Send one load; as many streams as `asked` names, request i to the i-th in turn."""
    server = reach(address)
    # Every load has prompts of its own, so that no prefix cache shortens the work.
    compose = composer(route, work, random.Random(), server.post)
    driver = Driver(server, route, compose, Limits(None, requests, timeout=ANSWER_LIMIT_S))
    return asyncio.run(driver.run_closed(planned(work, asked, requests), len(asked)))


def planned(work: Work, asked: Sequence[str], requests: int) -> Iterator[Planned]:
    """Yield the requests of a load."""
    for index in range(requests):
        yield Planned(
            index=index,
            at=0.0,
            task=asked[index % len(asked)],
            input_tokens=work.prompt,
            output_tokens=work.output,
        )


def composer(
    route: Dialect, work: Work, draw: random.Random, post: Callable[[str, bytes], bytes]
) -> Callable[[Planned], bytes]:
    """Return what makes requests with random prompts of token ids."""
    words = range(FIRST_WORD, work.shape.vocab)

    def compose(request: Planned) -> bytes:
        prompt = tuple(draw.choices(words, k=request.input_tokens))
        body = route.body(request.task, prompt, request.output_tokens)
        return post(route.path, json.dumps(body).encode())

    return compose


def kept(outcome: Outcome, work: Work) -> dict[str, Any]:
    """Return the figures of a run.

    Raises:
        LoadFailed: A request failed, tokens are missing, or prompts were not computed.
    """
    for record in outcome.records:
        if record.failure is not None:
            raise record.failure
    found = figures(outcome)
    tokens, cached = found["total_output_tokens"], found["cached_input_tokens"]
    if tokens != len(outcome.records) * work.output or cached:
        msg = (
            f"{len(outcome.records)} requests of {work.output} tokens got {tokens} with {cached} "
            "prompt tokens from the cache; all and none were expected"
        )
        raise LoadFailed(msg, group="other work")
    return {name: found[name] for name in FIGURES}


def median_run(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the run of median throughput, the lower one of two."""
    return sorted(runs, key=lambda run: run["output_throughput"])[(len(runs) - 1) // 2]

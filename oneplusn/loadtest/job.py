"""A load as one process can be told it, and what sends it or a part of it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from oneplusn.loadtest.dialects import DIALECTS, Dialect
from oneplusn.loadtest.drive import Counts, Driver, Limits, Outcome
from oneplusn.loadtest.prompts import Vocabulary, Words
from oneplusn.loadtest.transport import Server
from oneplusn.loadtest.workload import Planned, Workload

PROBE_INPUT_TOKENS = 8
PROBE_OUTPUT_TOKENS = 1


@dataclass(frozen=True, slots=True)
class Composer:
    """Makes the bytes of requests."""

    server: Server
    dialect: Dialect
    words: Words
    workload: Workload
    extra: dict[str, Any]

    def __call__(self, planned: Planned) -> bytes:
        """Return one request; its text follows from the seed and its place in the load."""
        prompt = planned.prompt
        if prompt is None:
            rng = self.workload.generator(f"text {planned.index}")
            prompt = self.words.text(planned.input_tokens, rng)
        body = self.dialect.body(planned.task, prompt, planned.output_tokens)
        return self.server.post(self.dialect.path, json.dumps({**body, **self.extra}).encode())

    def probe(self, task: str) -> bytes:
        """Return a short request to a task, with a text that nobody sent before."""
        at_random = time.perf_counter_ns()
        return self(Planned(at_random, 0.0, task, PROBE_INPUT_TOKENS, PROBE_OUTPUT_TOKENS))


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a process has to know to send a load, or its part of one.

    Attributes:
        endpoint: Name of the dialect.
        concurrency: Clients of a closed loop, over all parts; None for an open one.
        extra: Fields of every request.
        part: Which part this is: every `parts`-th request, from the `part`-th on.
    """

    server: Server
    endpoint: str
    vocabulary: Vocabulary
    workload: Workload
    limits: Limits
    concurrency: int | None
    extra: dict[str, Any]
    part: int = 0
    parts: int = 1

    @property
    def dialect(self) -> Dialect:
        """How requests are written and answers read."""
        return DIALECTS[self.endpoint]

    @property
    def composer(self) -> Composer:
        """What makes its requests."""
        words = Words(
            self.vocabulary.costs, self.vocabulary.overhead, self.workload.generator("words")
        )
        return Composer(self.server, self.dialect, words, self.workload, self.extra)

    def split(self, parts: int) -> list[Job]:
        """Return jobs that send the same requests together; at most one per client."""
        return [replace(self, part=part, parts=parts) for part in range(parts)]

    def share(self, total: int) -> int:
        """Return how many of a total are this part's."""
        return len(range(self.part, total, self.parts))


class Sender:
    """Sends a job from this process."""

    def __init__(self, job: Job) -> None:
        limits = job.limits
        self._job = job
        self._schedule = list[Planned]()
        if job.concurrency is None:
            every = job.workload.schedule(
                duration=limits.duration, requests=limits.requests, warmup=limits.warmup
            )
            self._schedule = every[job.part :: job.parts]
        elif limits.requests is not None:
            limits = replace(limits, requests=job.share(limits.requests))
        self._driver = Driver(job.server, job.dialect, job.composer, limits)

    @property
    def counts(self) -> Counts:
        """How it is going."""
        return self._driver.counts

    def halt(self) -> None:
        """Send nothing more, and give up what is not answered yet."""
        self._driver.halt()

    async def run(self, start: float | None = None) -> Outcome:
        """Send everything; a `start` on the clock of `time.perf_counter` is common to all parts."""
        job = self._job
        if job.concurrency is None:
            return await self._driver.run_open(self._schedule, start=start)
        requests = islice(job.workload.requests(), job.part, None, job.parts)
        clients = job.share(job.concurrency)
        return await self._driver.run_closed(requests, clients, start=start)

"""Send a load: when it is due in an open loop, or as fast as answers come in a closed one."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import msgspec

from oneplusn.loadtest.dialects import Dialect
from oneplusn.loadtest.exchange import Exchange, Pool
from oneplusn.loadtest.stream import Answer, LoadFailed, Reader
from oneplusn.loadtest.transport import Server
from oneplusn.loadtest.workload import Planned

LEAD_S = 0.05
"""From the start to the moment from which due times count, so that the first is not late."""
FAILURE_PAUSE_S = 0.5
"""What a client of a closed loop waits after a failure, so that it does not hammer the server."""
RECENT = 200

Compose = Callable[[Planned], bytes]
"""Makes the bytes of a request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a load ends.

    Attributes:
        duration: Seconds after the warm-up until which requests are sent; None for no such end.
        requests: How many are sent after the warm-up; None for no such end.
        warmup: Seconds of load that count for nothing.
        timeout: Seconds that an answer may take.
        retries: How often a request is sent again when the server asks for it.
    """

    duration: float | None
    requests: int | None
    warmup: float = 0.0
    timeout: float = 600.0
    retries: int = 0


@dataclass(slots=True, eq=False)
class Record:
    """What became of one request; without an answer and a failure it was given up at the end.

    Attributes:
        due: When it should have been sent, in seconds on the clock of `time.perf_counter`.
        sent: When the client began to send.
        connecting_s: How long connecting took; None if a connection was free.
        counts: It was due after the warm-up.
        retries: How often it was sent again.
    """

    planned: Planned
    due: float
    sent: float
    counts: bool
    connecting_s: float | None = None
    answer: Answer | None = None
    failure: LoadFailed | None = None
    retries: int = 0


@dataclass(slots=True)
class Outcome:
    """Everything that one load measured.

    Attributes:
        records: All requests, in the order sent, those of the warm-up included.
        begin: When the warm-up was over.
        end_of_sending: When no more requests were sent.
        cpu_shares: Of a core, for each process that sent, from the first request, warm-up included,
            until its last answer.
        interrupted: Somebody ended it early.
    """

    records: list[Record] = field(default_factory=list)
    begin: float = 0.0
    end_of_sending: float = 0.0
    cpu_shares: tuple[float, ...] = ()
    interrupted: bool = False

    @property
    def counted(self) -> list[Record]:
        """Those that count."""
        return [record for record in self.records if record.counts]


class Counts(msgspec.Struct, frozen=True, tag=True):
    """How a load is going.

    Attributes:
        sent: Requests.
        done: Requests that were answered.
        failed: Requests that were not.
        tokens: Events with text, those of unfinished answers included.
        first_tokens: The last times to first token, seconds.
    """

    sent: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    first_tokens: tuple[float, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.sent + other.sent,
            self.done + other.done,
            self.failed + other.failed,
            self.tokens + other.tokens,
            self.first_tokens + other.first_tokens,
        )


class Driver:
    """Sends one load.

    Attributes:
        outcome: What was measured so far.
    """

    def __init__(
        self,
        server: Server,
        dialect: Dialect,
        compose: Compose,
        limits: Limits,
        *,
        keep_text: bool = False,
    ) -> None:
        self.outcome = Outcome()
        self._sent = self._done = self._failed = 0
        self._first_tokens: deque[float] = deque(maxlen=RECENT)
        self._limits = limits
        self._pool = Pool(server)
        self._dialect = dialect
        self._compose = compose
        self._keep_text = keep_text
        self._halted = threading.Event()
        self._fault: BaseException | None = None
        self._tasks = set[asyncio.Task[Any]]()
        self._reading = set[Reader]()
        self._tokens = 0
        self._counted = 0

    @property
    def counts(self) -> Counts:
        """How it is going."""
        tokens = self._tokens + sum(len(reader.times) for reader in self._reading)
        first = tuple(self._first_tokens)
        return Counts(self._sent, self._done, self._failed, tokens, first)

    def halt(self) -> None:
        """Send nothing more, and give up what is not answered yet."""
        self.outcome.interrupted = True
        self.outcome.end_of_sending = time.perf_counter()
        self._halted.set()
        for task in self._tasks:
            task.cancel()

    async def run_open(self, schedule: Sequence[Planned], *, start: float | None = None) -> Outcome:
        """Send every request when it is due, however many are unanswered.

        Args:
            schedule: What to send, in the order of its times.
            start: When the clock of the schedule begins, as `time.perf_counter` tells it; soon
                unless several processes begin together.
        """
        with self._measuring():
            start = time.perf_counter() + LEAD_S if start is None else start
            self.outcome.begin = start + self._limits.warmup
            loop = asyncio.get_running_loop()
            try:
                await asyncio.to_thread(self._keep_time, schedule, start, loop)
                await self._gather()
            finally:
                self._halted.set()
        return self.outcome

    def _keep_time(
        self, schedule: Sequence[Planned], start: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Start each request at its time. A thread does it: the loop's timers are 1 ms coarse."""
        for planned in schedule:
            request, due = self._compose(planned), start + planned.at
            if self._halted.wait(due - time.perf_counter()):
                return
            loop.call_soon_threadsafe(self._launch, planned, request, due)

    def _launch(self, planned: Planned, request: bytes, due: float) -> None:
        if not self._halted.is_set():
            self._spawn(self._exchange(planned, request, due))

    async def run_closed(
        self, requests: Iterator[Planned], concurrency: int, *, start: float | None = None
    ) -> Outcome:
        """Let a fixed number of clients each send its next request once it has its answer.

        Args:
            requests: What they send, without end.
            concurrency: How many clients.
            start: When they begin, as `time.perf_counter` tells it; at once if None.
        """
        composed = ((planned, self._compose(planned)) for planned in requests)
        with self._measuring():
            # All at once, and not one after the other as each is written.
            first = list(islice(composed, concurrency))
            start = time.perf_counter() if start is None else start
            self.outcome.begin = start + self._limits.warmup
            await asyncio.sleep(start - time.perf_counter())
            now = time.perf_counter()
            for mine in first:
                self._spawn(self._client(chain([mine], composed), now))
            await self._gather()
        return self.outcome

    async def _client(self, composed: Iterator[tuple[Planned, bytes]], due: float) -> None:
        for planned, request in composed:
            if self._is_over(due):
                return
            record, due = await self._exchange(planned, request, due)
            if record.failure is not None:
                await asyncio.sleep(record.failure.retry_after or FAILURE_PAUSE_S)
                due = time.perf_counter()

    def _is_over(self, due: float) -> bool:
        limits = self._limits
        if self._halted.is_set():
            return True
        if limits.duration is not None and due >= self.outcome.begin + limits.duration:
            return True
        if limits.requests is None or due < self.outcome.begin:
            return False
        return self._counted >= limits.requests

    async def _exchange(self, planned: Planned, request: bytes, due: float) -> tuple[Record, float]:
        """Send one request, again if it may; return what became of it, and when that was known."""
        record = Record(planned, due, time.perf_counter(), due >= self.outcome.begin)
        self.outcome.records.append(record)
        self._sent += 1
        self._counted += record.counts
        while True:
            reader = Reader(self._dialect, keep_text=self._keep_text)
            self._reading.add(reader)
            exchange = Exchange(request, reader)
            try:
                await exchange.run(self._pool, limit_s=self._limits.timeout)
                record.answer = reader.finish(record.sent)
            except LoadFailed as error:
                if error.retry_after is not None and record.retries < self._limits.retries:
                    record.retries += 1
                    await asyncio.sleep(error.retry_after)
                    continue
                record.failure = error
            finally:
                self._reading.discard(reader)
                self._tokens += len(reader.times)
                record.connecting_s = exchange.connecting_s
            self._note(record)
            return record, exchange.last

    def _note(self, record: Record) -> None:
        if record.answer is None:
            self._failed += 1
            return
        self._done += 1
        if record.answer.times:
            self._first_tokens.append(record.answer.first_token_s)

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._settle)

    def _settle(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._fault = fault
            self.halt()

    async def _gather(self) -> None:
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        if self._fault is not None:
            raise self._fault

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Note times; meanwhile no collection of garbage may come between a byte and its clock."""
        outcome = self.outcome
        gc.collect()
        gc.disable()
        cpu = time.process_time()
        try:
            yield
        finally:
            gc.enable()
            self._pool.close()
            start = outcome.begin - self._limits.warmup
            seconds = max(time.perf_counter() - start, LEAD_S)
            outcome.cpu_shares = ((time.process_time() - cpu) / seconds,)
            outcome.end_of_sending = self._end_of_sending()

    def _end_of_sending(self) -> float:
        outcome, limits = self.outcome, self._limits
        ends = [outcome.end_of_sending] if outcome.interrupted else []
        if limits.duration is not None:
            ends.append(outcome.begin + limits.duration)
        if limits.requests is not None:
            ends.append(max((record.sent for record in outcome.records), default=outcome.begin))
        return min(ends)

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
from typing import Any

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
        seconds: From the first request, warm-up included, until the last answer.
        cpu_seconds: Processor time that this process took for it.
        interrupted: Somebody ended it early.
    """

    records: list[Record] = field(default_factory=list)
    begin: float = 0.0
    end_of_sending: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    interrupted: bool = False

    @property
    def counted(self) -> list[Record]:
        """Those that count."""
        return [record for record in self.records if record.counts]


class Driver:
    """Sends one load.

    Attributes:
        outcome: What was measured so far.
        sent: Requests.
        done: Requests that were answered.
        failed: Requests that were not.
        first_tokens: The last times to first token, seconds.
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
        self.sent = self.done = self.failed = 0
        self.first_tokens: deque[float] = deque(maxlen=RECENT)
        self.limits = limits
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
    def tokens(self) -> int:
        """Events with text so far, those of unfinished answers included."""
        return self._tokens + sum(len(reader.times) for reader in self._reading)

    def halt(self) -> None:
        """Send nothing more, and give up what is not answered yet."""
        self.outcome.interrupted = True
        self.outcome.end_of_sending = time.perf_counter()
        self._halted.set()
        for task in self._tasks:
            task.cancel()

    async def run_open(self, schedule: Sequence[Planned]) -> Outcome:
        """Send every request when it is due, however many are unanswered."""
        with self._measuring():
            start = time.perf_counter() + LEAD_S
            self.outcome.begin = start + self.limits.warmup
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

    async def run_closed(self, requests: Iterator[Planned], concurrency: int) -> Outcome:
        """Let a fixed number of clients each send its next request once it has its answer."""
        with self._measuring():
            start = time.perf_counter()
            self.outcome.begin = start + self.limits.warmup
            for _ in range(concurrency):
                self._spawn(self._client(requests, start))
            await self._gather()
        return self.outcome

    async def _client(self, requests: Iterator[Planned], due: float) -> None:
        for planned in requests:
            if self._is_over(due):
                return
            request = self._compose(planned)
            record, due = await self._exchange(planned, request, due)
            if record.failure is not None:
                await asyncio.sleep(record.failure.retry_after or FAILURE_PAUSE_S)
                due = time.perf_counter()

    def _is_over(self, due: float) -> bool:
        limits = self.limits
        if limits.duration is not None and due >= self.outcome.begin + limits.duration:
            return True
        if limits.requests is None or due < self.outcome.begin:
            return False
        return self._counted >= limits.requests

    async def _exchange(self, planned: Planned, request: bytes, due: float) -> tuple[Record, float]:
        """Send one request, again if it may; return what became of it, and when that was known."""
        record = Record(planned, due, time.perf_counter(), due >= self.outcome.begin)
        self.outcome.records.append(record)
        self.sent += 1
        self._counted += record.counts
        while True:
            reader = Reader(self._dialect, keep_text=self._keep_text)
            self._reading.add(reader)
            exchange = Exchange(request, reader)
            try:
                await exchange.run(self._pool, limit_s=self.limits.timeout)
                record.answer = reader.finish(record.sent)
            except LoadFailed as error:
                if error.retry_after is not None and record.retries < self.limits.retries:
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
            self.failed += 1
            return
        self.done += 1
        if record.answer.times:
            self.first_tokens.append(record.answer.first_token_s)

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
        started, cpu = time.perf_counter(), time.process_time()
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            self._pool.close()
            outcome.seconds = time.perf_counter() - started
            outcome.cpu_seconds = time.process_time() - cpu
            outcome.end_of_sending = self._end_of_sending()

    def _end_of_sending(self) -> float:
        outcome, limits = self.outcome, self.limits
        ends = [outcome.end_of_sending] if outcome.interrupted else []
        if limits.duration is not None:
            ends.append(outcome.begin + limits.duration)
        if limits.requests is not None:
            ends.append(max((record.sent for record in outcome.records), default=outcome.begin))
        return min(ends)

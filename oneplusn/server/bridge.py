"""The engine as asyncio code sees it: streams of tokens, adapters that come and go.

The engine runs in a process of its own (`supervisor.py` keeps it running) and never waits for a
client: what a step yields is handed out here, and a stream whose reader falls too far behind is
cancelled. When the engine is lost, everything in flight fails at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Set
from contextlib import suppress
from typing import Any

from oneplusn.errors import (
    AdapterNotFound,
    EngineStopped,
    OneplusnError,
    QueueFull,
    ServingError,
    rebuild,
)
from oneplusn.server.adapter_memory import AdapterMemory
from oneplusn.server.messages import (
    Cancel,
    Freed,
    FromEngine,
    Loaded,
    Ready,
    Refusal,
    Stats,
    StepOutputs,
    StepStats,
    Submit,
    Warm,
)
from oneplusn.server.metrics import Metrics
from oneplusn.server.metrics_compat import TasksInFlight
from oneplusn.server.streams import TokenStream
from oneplusn.server.supervisor import EngineProcess, Launch, Supervisor

_log = logging.getLogger("oneplusn.server")


class AsyncEngine:
    """The engine, for asyncio code. Every method is called on the event loop.

    Attributes:
        info: What the engine says of its model; None until it is loaded for the first time.
        failure: Why requests are not accepted; None while they are, and before the start.
        stats: Occupancy, as last told.
        on_ready: Brings the adapters back after a restart; requests are accepted when it is done.
        locate: Finds the page image of a version that a request needs and that was evicted.
    """

    def __init__(
        self, launch: Launch, metrics: Metrics, *, max_queue: int, step_timeout: float = 30.0
    ) -> None:
        self.info: Ready | None = None
        self.failure: OneplusnError | None = None
        self.stats: Stats | None = None
        self.on_ready: Callable[[], Awaitable[None]] | None = None
        self.locate: Callable[[str], Awaitable[str]] | None = None
        self._metrics = metrics
        self._max_queue = max_queue
        self._supervisor = Supervisor(launch, self, step_timeout=step_timeout)
        self._is_up = False
        self._streams: dict[str, TokenStream] = {}
        self._adapters = AdapterMemory(self._supervisor.send, metrics)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: asyncio.Task[None] | None = None
        self._started: asyncio.Future[Ready] | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._is_up and self.failure is None

    @property
    def alive(self) -> bool:
        """Whether there is an engine, or will be."""
        return self._supervisor.alive

    @property
    def restarts(self) -> int:
        """How often the engine was started again."""
        return self._supervisor.restarts

    @property
    def process(self) -> EngineProcess | None:
        """The engine that runs, if one does."""
        return self._supervisor.process

    @property
    def resident(self) -> Set[str]:
        """Digests of the versions that are in the engine's memory."""
        return self._adapters.resident

    @property
    def unfinished(self) -> int:
        """Requests in flight."""
        return len(self._streams)

    @property
    def tasks_in_flight(self) -> TasksInFlight:
        """Tasks with a sequence that has got its first token, and with one that waits for it."""
        tasks = TasksInFlight(set(), set())
        for stream in self._streams.values():
            names = tasks.waiting if stream.first is None else tasks.running
            names.update(ref.task for ref in stream.submit.refs)
        return tasks

    @property
    def is_waiting(self) -> bool:
        """Whether the engine owes an answer."""
        return bool(self._streams or self._adapters.loading)

    async def start(self) -> Ready:
        """Start the engine; return what it says once the model is loaded.

        Raises:
            OneplusnError: The model is refused, or does not fit.
        """
        self._started = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._supervisor.run())
        return await self._started

    def stream(self, submit: Submit, wake: asyncio.Event | None = None) -> TokenStream:
        """Send a request to the engine, and hand out its tokens.

        It is sent before this returns, unless a version that it names has to be loaded first.

        Args:
            submit: The request.
            wake: Set whenever there is something to read; None = one of the stream's own.

        Raises:
            EngineStopped: The engine is not ready.
            QueueFull: Too many requests are unfinished.
        """
        self._check(self.ready)
        if len(self._streams) >= self._max_queue:
            msg = f"{self._max_queue} sequences are unfinished; wait, or raise --max-queue"
            raise QueueFull(msg)
        stream = self._streams[submit.id] = TokenStream(submit, self._release, wake)
        if submit.refs:
            found = {ref.digest for ref in submit.refs} <= self.resident
            self._metrics.count("adapter_cache_hits" if found else "adapter_cache_misses")
        self._send(submit)
        return stream

    async def load(self, digest: str, path: str, *, pin: bool = False) -> int:
        """Make an adapter version resident; return its bytes.

        Args:
            digest: The version.
            path: Its page image.
            pin: Keep it until it is unloaded, whoever needs room.

        Raises:
            AdapterError: It does not fit the model or the memory.
            EngineStopped: The engine is not there, or was lost meanwhile.
        """
        self._check(self._is_up)
        return await asyncio.shield(self._adapters.load(digest, path, pin=pin))

    async def unload(self, digest: str, *, force: bool = False) -> int:
        """Drop an adapter version once no request uses it; return the bytes freed.

        They are 0 if it was asked for again meanwhile, and stays.

        Args:
            digest: The version.
            force: End the requests that use it.

        Raises:
            AdapterNotFound: It is not resident.
            EngineStopped: The engine is not there, or was lost meanwhile.
        """
        self._check(self._is_up)
        return await asyncio.shield(self._adapters.unload(digest, force=force))

    def warm(self) -> None:
        """Let the engine load what grammars need, before a request waits for it."""
        self._supervisor.send(Warm())

    def end(self, error: OneplusnError) -> None:
        """End everything in flight."""
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            self._supervisor.send(Cancel(request_id))
            stream.fail(error)

    async def close(self) -> None:
        """End what is in flight, and the engine."""
        self._stop(EngineStopped("the server is shutting down"))
        if self._started is not None:
            self._started.cancel()
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running

    # What follows is for the supervisor.

    def receive(self, message: FromEngine) -> None:
        """Take what the engine said."""
        match message:
            case StepOutputs():
                self._deliver(message)
            case Loaded() | Freed():
                self._adapters.receive(message)
            case Stats():
                self.stats = message
                self._metrics.observe_occupancy(message)
            case Ready():
                self._begin(message)

    def lost(self, error: OneplusnError) -> None:
        """Fail everything in flight, and everything that is asked until there is an engine."""
        self._stop(error)
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)

    def _stop(self, error: OneplusnError) -> None:
        self._is_up = False
        self.failure = error
        for task in self._tasks:
            task.cancel()
        self.end(error)
        self._adapters.lost(error)
        self._metrics.observe_step(StepStats())

    def _begin(self, ready: Ready) -> None:
        """Accept requests, at once or when the adapters are back."""
        self._is_up = True
        self.info = ready
        assert self._started is not None
        if self._started.done():
            self._spawn(self._restore())
        else:
            self._started.set_result(ready)

    async def _restore(self) -> None:
        try:
            if self.on_ready is not None:
                await self.on_ready()
        except Exception:
            # Whatever it was, the base and the other adapters can be served.
            _log.exception("not every adapter is back")
        self.failure = None
        self.warm()

    def _check(self, holds: bool) -> None:
        """Refuse what needs an engine while there is none.

        Raises:
            EngineStopped: It is starting, or was lost.
        """
        if not holds:
            raise self.failure or EngineStopped("the model is loading; try again in a few seconds")

    def _send(self, submit: Submit) -> None:
        """Send a request, behind the loads of the versions that it needs."""
        missing = self._adapters.missing(submit.refs)
        if missing and self.locate is not None:
            self._spawn(self._bring(submit, missing))
        else:
            self._supervisor.send(submit)

    async def _bring(self, submit: Submit, digests: Set[str]) -> None:
        """Load versions and send a request behind them; it waits for them in the engine."""
        assert self.locate is not None
        try:
            for digest in sorted(digests):
                path = await self.locate(digest)
                self._adapters.load(digest, path, pin=None)
        except OneplusnError as error:
            self._reject(submit.id, error)
        except Exception:
            # Whatever it was, nobody may wait for this request any more.
            _log.exception("an adapter that a request needs could not be found")
            self._reject(submit.id, ServingError("its adapter could not be brought into memory"))
        if submit.id in self._streams:
            self._supervisor.send(submit)

    def _release(self, request_id: str) -> None:
        """Forget a stream, and cancel its request if it has not ended."""
        if self._streams.pop(request_id, None) is not None:
            self._supervisor.send(Cancel(request_id))

    def _deliver(self, step: StepOutputs) -> None:
        """Hand out the tokens of one step."""
        now = time.perf_counter()
        self._metrics.observe_step(step.stats)
        for refusal in step.refused:
            self._refuse(refusal)
        for output in step.outputs:
            stream = self._streams.get(output.id)
            if stream is None:
                continue
            if output.token is not None:
                self._observe(stream, now)
            if output.finish is not None:
                del self._streams[output.id]
            if not stream.push(output):
                self._metrics.count("stream_backpressure_aborts")

    def _observe(self, stream: TokenStream, now: float) -> None:
        if stream.first is None:
            stream.first = now
            self._metrics.observe("time_to_first_token_seconds", now - stream.submitted)
        else:
            self._metrics.observe("inter_token_latency_seconds", now - stream.last)
        stream.last = now

    def _refuse(self, refusal: Refusal) -> None:
        """Fail a request that the engine did not take, unless a version was just leaving."""
        stream = self._streams.get(refusal.id)
        if stream is None:
            return
        is_gone = refusal.kind == AdapterNotFound.__name__ and self.locate is not None
        if is_gone and not stream.sent_again:
            stream.sent_again = True
            self._spawn(self._bring(stream.submit, {ref.digest for ref in stream.submit.refs}))
            return
        error = rebuild(refusal.kind, refusal.message, code=refusal.code, param=refusal.param)
        self._reject(refusal.id, error)

    def _reject(self, request_id: str, error: OneplusnError) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.fail(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

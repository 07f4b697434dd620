"""Join the event loop and the engine: the only place where asyncio meets the step loop.

One thread owns the engine core. Commands go in through a queue, on which the thread sleeps while
it has nothing to compute; what a step yields comes out in one call to the loop, however many
tokens it holds. The engine never waits for a client: a stream whose reader falls too far behind is
cancelled. When the engine dies, everything in flight fails at once and nothing more is accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVarTuple

from oneplusn.errors import EngineStopped, OneplusnError, QueueFull, RequestCancelled, ServingError
from oneplusn.server.messages import Cancel, StepOutputs, StepStats, Submit, TokenOutput
from oneplusn.server.metrics import Metrics

if TYPE_CHECKING:
    from oneplusn.adapters.bundle import Bundle

MAX_BUFFERED = 1024
Ts = TypeVarTuple("Ts")
_log = logging.getLogger("oneplusn.engine")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the API needs to know of the base model.

    Attributes:
        folder: Where the tokenizer lies.
        max_model_len: Longest prompt plus completion, in tokens.
    """

    folder: Path
    max_model_len: int


class EngineCore(Protocol):
    """The engine as its thread drives it; `Engine` of `engine/engine.py`, or a test's script."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute."""

    def submit(self, message: Submit) -> None:
        """Queue a request, or raise why it cannot be served."""

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""

    def load(self, bundle: Bundle) -> int:
        """Make an adapter version resident; return its bytes."""

    def unload(self, digest: str) -> int:
        """Drop a version that no request refers to; return the bytes freed."""

    def step(self) -> StepOutputs:
        """Compute one batch."""


EngineFactory = Callable[[], tuple[EngineCore, ModelInfo]]


class TokenStream:
    """The tokens of one request, as an async iterator. Lives on the event loop.

    Attributes:
        submitted: When the request went to the engine, by `time.perf_counter`.
        first: When its first token came, if one has.
        last: When its latest token came.
    """

    def __init__(self, request_id: str, release: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.submitted = time.perf_counter()
        self.first: float | None = None
        self.last = self.submitted
        self._release = release
        self._buffer: deque[TokenOutput] = deque()
        self._wake = asyncio.Event()
        self._error: OneplusnError | None = None
        self._ended = False

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._buffer.popleft()

    def push(self, output: TokenOutput) -> None:
        """Hand over what the engine made; the reader sees an end without a token as an error."""
        if output.finish == "error":
            self.fail(ServingError(output.error or "the engine could not go on with this request"))
        elif output.finish == "abort":
            self.fail(RequestCancelled("the request was cancelled"))
        elif len(self._buffer) >= MAX_BUFFERED:
            self._release(self.request_id)
            self._buffer.clear()
            msg = f"{MAX_BUFFERED} tokens wait to be read; read the stream faster"
            self.fail(RequestCancelled(msg))
        else:
            self._buffer.append(output)
            self._ended = output.finish is not None
            self._wake.set()

    def fail(self, error: OneplusnError) -> None:
        """End the stream with an error, after what it still holds."""
        self._error = error
        self._wake.set()

    def close(self) -> None:
        """Stop reading; a request that has not ended is cancelled."""
        self._release(self.request_id)


@dataclass(slots=True)
class _Load:
    bundle: Bundle
    done: Future[int] = field(default_factory=Future)


@dataclass(slots=True)
class _Unload:
    digest: str
    done: Future[int] = field(default_factory=Future)


class _Stop:
    pass


_Command = Submit | Cancel | _Load | _Unload | _Stop


class AsyncEngine:
    """The engine, for asyncio code. Every method is called on the event loop.

    Attributes:
        model: What was loaded; None until the engine is ready.
        failure: Why the engine is not there any more; None while it is.
    """

    def __init__(self, factory: EngineFactory, metrics: Metrics, *, max_queue: int) -> None:
        self.model: ModelInfo | None = None
        self.failure: OneplusnError | None = None
        self._factory = factory
        self._metrics = metrics
        self._max_queue = max_queue
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, TokenStream] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._started: Future[ModelInfo] = Future()
        self._loop: asyncio.AbstractEventLoop

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.model is not None and self.failure is None

    async def start(self) -> ModelInfo:
        """Load the model on the engine's thread.

        Raises:
            OneplusnError: The factory raised it: the model is refused, or does not fit.
        """
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self.model = await asyncio.wrap_future(self._started)
        return self.model

    def stream(self, submit: Submit) -> TokenStream:
        """Send a request to the engine, before this returns, and hand out its tokens.

        Raises:
            EngineStopped: The engine is not ready.
            QueueFull: Too many requests are unfinished.
        """
        self._check()
        if len(self._streams) >= self._max_queue:
            msg = f"{self._max_queue} sequences are unfinished; wait, or raise --max-queue"
            raise QueueFull(msg)
        stream = TokenStream(submit.id, self._release)
        self._streams[submit.id] = stream
        self._commands.put(submit)
        return stream

    async def load(self, bundle: Bundle) -> int:
        """Make an adapter version resident; return its bytes.

        Raises:
            OneplusnError: It does not fit the model or the memory.
        """
        self._check()
        command = _Load(bundle)
        self._commands.put(command)
        return await asyncio.wrap_future(command.done)

    async def unload(self, digest: str) -> int:
        """Drop an adapter version; return the bytes freed.

        Raises:
            AdapterError: It is in use or not resident.
        """
        self._check()
        command = _Unload(digest)
        self._commands.put(command)
        return await asyncio.wrap_future(command.done)

    async def close(self) -> None:
        """End what is in flight and stop the thread, unless it is still loading the model."""
        if self.ready:
            self._end(EngineStopped("the server is shutting down"))
            self._commands.put(_Stop())
            await asyncio.to_thread(self._thread.join)

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self.model is None:
            raise EngineStopped("the model is loading; try again in a few seconds")

    def _release(self, request_id: str) -> None:
        """Forget a stream, and cancel its request if it has not ended."""
        if self._streams.pop(request_id, None) is not None:
            self._commands.put(Cancel(request_id))

    def _deliver(self, step: StepOutputs) -> None:
        """Hand out the tokens of one step."""
        now = time.perf_counter()
        self._metrics.observe_step(step.stats)
        for output in step.outputs:
            stream = self._streams.get(output.id)
            if stream is None:
                continue
            if output.token is not None:
                self._observe(stream, now)
            if output.finish is not None:
                del self._streams[output.id]
            stream.push(output)

    def _observe(self, stream: TokenStream, now: float) -> None:
        if stream.first is None:
            stream.first = now
            self._metrics.observe("time_to_first_token_seconds", now - stream.submitted)
        else:
            self._metrics.observe("inter_token_latency_seconds", now - stream.last)
        stream.last = now

    def _reject(self, request_id: str, error: OneplusnError) -> None:
        """Fail a request that the engine did not take."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.fail(error)

    def _end(self, error: OneplusnError) -> None:
        """Fail everything in flight, and everything that is asked from now on."""
        self.failure = error
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        for command in self._drain():
            if isinstance(command, _Load | _Unload) and command.done.set_running_or_notify_cancel():
                command.done.set_exception(error)

    def _drain(self) -> list[_Command]:
        """Take the commands that wait, without waiting for more."""
        commands: list[_Command] = []
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._commands.get_nowait())
        return commands

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        self._started.set_running_or_notify_cancel()
        try:
            core, model = self._factory()
        except BaseException as error:
            # Whoever awaits `start` gets it, whatever it is.
            self._started.set_exception(error)
            return
        self._started.set_result(model)
        try:
            self._serve(core)
        except Exception:
            # Nothing can be said about the state of the core after a fault of ours.
            _log.exception("the engine stopped")
            self._post(self._end, EngineStopped("the engine failed; the server must be restarted"))

    def _serve(self, core: EngineCore) -> None:
        """Step while there is work; take commands between steps, and sleep on them otherwise."""
        busy = False
        while True:
            waited = [] if core.has_work else [self._commands.get()]
            for command in (*waited, *self._drain()):
                if isinstance(command, _Stop):
                    return
                self._handle(core, command)
            if core.has_work:
                self._post(self._deliver, core.step())
            elif busy:
                # No step follows that could say so when the last requests were cancelled.
                self._post(self._deliver, StepOutputs([], StepStats()))
            busy = core.has_work

    def _handle(self, core: EngineCore, command: Submit | Cancel | _Load | _Unload) -> None:
        match command:
            case Submit():
                try:
                    core.submit(command)
                except OneplusnError as error:
                    self._post(self._reject, command.id, error)
            case Cancel():
                core.cancel(command.id)
            case _Load():
                _settle(command.done, lambda: core.load(command.bundle))
            case _Unload():
                _settle(command.done, lambda: core.unload(command.digest))

    def _post(self, callback: Callable[[*Ts], None], *args: *Ts) -> None:
        """Run `callback` on the loop; a loop that has closed needs nothing any more."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)


def _settle(done: Future[int], work: Callable[[], int]) -> None:
    """Do the work and pass on its result or the caller's mistake."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except OneplusnError as error:
        done.set_exception(error)

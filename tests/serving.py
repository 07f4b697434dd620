"""A server with a scripted engine behind it, on a real port, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from oneplusn.demo.tokenizer import END_ID, build_tokenizer
from oneplusn.errors import AdapterError, AdapterNotFound, InvalidRequest, PoolExhausted
from oneplusn.server.app import create_app
from oneplusn.server.bridge import EngineCore, ModelInfo
from oneplusn.server.messages import StepOutputs, StepStats, Submit, TokenOutput
from oneplusn.server.settings import Settings
from oneplusn.server.state import Server

CONTEXT = 256
VOCAB = 259


@dataclass
class Running:
    """A request in the scripted engine, with the tokens that it still has to emit."""

    submit: Submit
    left: list[int]
    given: int = 0


@dataclass
class ScriptedCore:
    """An engine whose answers are known: the base repeats the prompt, a task shouts its name.

    Prompts steer it: `endless` never ends by itself, `crash` breaks the engine, `fail` fails the
    request. A step takes `step_seconds`. While `paused`, nothing is computed, so that requests
    stay in flight; `together` holds the first step back until so many requests are there.
    """

    paused: bool = False
    together: int = 1
    step_seconds: float = 0.001
    capacity: int = 100
    requests: dict[str, Running] = field(default_factory=dict)
    submitted: list[Submit] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    resident: dict[str, object] = field(default_factory=dict)
    most_together: int = 0
    cancelled_once: threading.Event = field(default_factory=threading.Event)

    @property
    def has_work(self) -> bool:
        if len(self.requests) < self.together or self.paused:
            return False
        self.together = 1
        return bool(self.requests)

    def submit(self, message: Submit) -> None:
        for ref in message.refs:
            if ref.digest not in self.resident:
                raise AdapterNotFound(f"{ref.digest} is not resident")
        for param, tokens in {
            "prompt": message.tokens,
            "logit_bias": message.sampling.logit_bias,
        }.items():
            if max(tokens, default=0) >= VOCAB:
                raise InvalidRequest("no such token", param=param)
        self.submitted.append(message)
        self.requests[message.id] = Running(message, answer(message))

    def cancel(self, request_id: str) -> None:
        if self.requests.pop(request_id, None) is not None:
            self.cancelled.append(request_id)
            self.cancelled_once.set()

    def load(self, bundle) -> int:
        if len({*self.resident, bundle.digest}) > self.capacity:
            raise PoolExhausted("no room for it")
        self.resident[bundle.digest] = bundle
        return 1000

    def unload(self, digest: str) -> int:
        for running in self.requests.values():
            if digest in {ref.digest for ref in running.submit.refs}:
                raise AdapterError("a request uses it", code="adapter_in_use")
        if self.resident.pop(digest, None) is None:
            raise AdapterNotFound("it is not resident")
        return 1000

    def step(self) -> StepOutputs:
        time.sleep(self.step_seconds)
        self.most_together = max(self.most_together, len(self.requests))
        refs = {running.submit.refs for running in self.requests.values()} - {()}
        clusters = {tuple(ref.digest for ref in blend) for blend in refs}
        outputs = [emit(running) for running in list(self.requests.values())]
        for output in outputs:
            if output.finish is not None:
                del self.requests[output.id]
        stats = StepStats(
            num_tokens=len(outputs),
            distinct_tasks=len(refs),
            distinct_clusters=len(clusters),
            running=len(self.requests),
            step_seconds=self.step_seconds,
        )
        return StepOutputs(outputs, stats)


def answer(message: Submit) -> list[int]:
    prompt = bytes(token for token in message.tokens if token < 256).decode()
    if prompt == "endless":
        return [ord("x")] * 100_000
    text = prompt
    if message.refs:
        text = "+".join(f"{ref.task.upper()}*{ref.weight:g}" for ref in message.refs) + f":{prompt}"
    end = [] if message.sampling.ignore_eos else [END_ID]
    return [*text.encode(), *end] or [END_ID]


def emit(running: Running) -> TokenOutput:
    message = running.submit
    prompt = bytes(token for token in message.tokens if token < 256)
    if prompt == b"crash":
        raise RuntimeError("scripted fault")
    if prompt == b"fail":
        return TokenOutput(message.id, finish="error", error="the model failed on this one")
    token = running.left.pop(0) if running.left else ord("z")
    running.given += 1
    ended = token == END_ID
    finish = "stop" if ended else "length" if running.given >= message.sampling.max_tokens else None
    wanted = message.sampling.logprobs
    return TokenOutput(
        message.id,
        token,
        logprob=None if wanted is None else -0.5,
        top=[(other, -1.0 - other) for other in range(97, 97 + wanted)] if wanted else None,
        finish=finish,
        cached_tokens=16 if len(message.tokens) > 16 else 0,
    )


@dataclass
class Live:
    """A running server: where it listens, and what is behind it."""

    url: str
    core: ScriptedCore
    server: Server


def factory(core: EngineCore, folder: Path) -> Callable[[], tuple[EngineCore, ModelInfo]]:
    build_tokenizer(folder)
    return lambda: (core, ModelInfo(folder, CONTEXT))


@contextmanager
def serving(settings: Settings, folder: Path, core: ScriptedCore | None = None) -> Iterator[Live]:
    """Serve until the block ends; it starts when every adapter is loaded."""
    core = core or ScriptedCore()
    failures: list[BaseException] = []
    app = create_app(settings, factory(core, folder), on_failure=failures.append)
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    server: Server = app.state.server
    try:
        wait_until(lambda: bool(failures) or (uvicorn_server.started and server.ready))
        if failures:
            raise failures[0]
        port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", core, server)
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Look at a condition of another thread until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)

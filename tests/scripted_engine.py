"""An engine that follows a script, and what it says of its model. Imports little, and no torch."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oneplusn.adapters.prepared import SiteInfo
from oneplusn.demo.tokenizer import END_ID
from oneplusn.errors import AdapterNotFound, InvalidRequest, PoolExhausted
from oneplusn.server.messages import (
    Freed,
    Load,
    Loaded,
    Ready,
    Stats,
    StepOutputs,
    StepStats,
    Submit,
    TokenOutput,
)

CONTEXT = 256
VOCAB = 259
MODULE = "model.layers.0.self_attn.q_proj"
WIDTH = 8


@dataclass
class Running:
    """A request in the scripted engine, with the tokens that it still has to emit."""

    submit: Submit
    left: list[int]
    given: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        """Whether the request's own deadline has passed."""
        limit = self.submit.timeout
        return limit is not None and time.monotonic() - self.began > limit


@dataclass
class ScriptedCore:
    """An engine whose answers are known: the base repeats the prompt, a task shouts its name.

    Prompts steer it: `endless` never ends by itself, `crash` breaks the engine, `fail` fails the
    request. A step takes `step_seconds`. While `paused`, nothing is computed, so that requests
    stay in flight; `together` holds the first step back until so many requests are there. More
    than `capacity` versions are refused; with more than `room` the oldest that is idle leaves.
    """

    paused: bool = False
    together: int = 1
    step_seconds: float = 0.001
    capacity: int = 100
    room: int = 100
    requests: dict[str, Running] = field(default_factory=dict)
    submitted: list[Submit] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    resident: dict[str, Load] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    events: list[Loaded | Freed] = field(default_factory=list)
    most_together: int = 0
    steps: int = 0
    warmed: int = 0
    cancelled_once: threading.Event = field(default_factory=threading.Event)

    @property
    def has_work(self) -> bool:
        if len(self.requests) < self.together or self.paused:
            return False
        self.together = 1
        return bool(self.requests)

    @property
    def is_writing(self) -> bool:
        return False

    @property
    def stats(self) -> Stats:
        return Stats(100, 100 - len(self.requests), 0, 0, list(self.resident))

    def begin(self) -> None:
        """Start a new life, which knows nothing of the one before."""
        for held in (self.requests, self.resident, self.pinned, self.leaving, self.events):
            held.clear()

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

    def keep(self, digest: str, *, pin: bool | None = False) -> bool:
        self.leaving.discard(digest)
        (self.pinned.add if pin else self.pinned.discard)(digest)
        if digest in self.resident:
            self.events.append(Loaded(digest, 1000))
        return digest in self.resident

    def begin_load(self, image: Any, *, pin: bool | None = False) -> None:
        if len(self.resident) >= self.capacity:
            error = PoolExhausted("no room for it")
            self.events.append(Loaded(image.digest, error=error.message, code=error.code))
        else:
            if len(self.resident) >= self.room:
                self.evict(next(d for d in self.resident if d not in self.used | self.pinned))
            self.resident[image.digest] = image
            self.events.append(Loaded(image.digest, 1000))

    def write_some(self, seconds: float) -> None:
        raise AssertionError("there is nothing to write")

    def unload(self, digest: str, *, force: bool = False) -> None:
        self.leaving.add(digest)

    def warm(self) -> None:
        self.warmed += 1

    def evict(self, digest: str) -> None:
        """Let a version go as the pool does it, when another needs the room."""
        del self.resident[digest]
        self.events.append(Freed(digest, 1000))

    @property
    def used(self) -> set[str]:
        """Versions that a request refers to."""
        return {ref.digest for running in self.requests.values() for ref in running.submit.refs}

    def poll(self) -> list[Loaded | Freed]:
        for digest in sorted(self.leaving - self.used):
            self.leaving.remove(digest)
            freed = 1000 if self.resident.pop(digest, None) is not None else 0
            self.events.append(Freed(digest, freed))
        events, self.events = self.events, []
        return events

    def step(self) -> StepOutputs:
        time.sleep(self.step_seconds)
        self.steps += 1
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
    if running.is_late:
        return TokenOutput(message.id, finish="timeout")
    token = running.left.pop(0) if running.left else ord("z")
    running.given += 1
    ended = token == END_ID or token in message.sampling.stop_token_ids
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


def ready_message(folder: Path, context: int = CONTEXT) -> Ready:
    """What an engine says of a model with one linear."""
    return Ready(
        model="tiny-base",
        folder=str(folder),
        max_model_len=context,
        vocab_size=VOCAB,
        eos_ids=(END_ID,),
        dtype="float32",
        sites=(SiteInfo(MODULE, WIDTH, (WIDTH,), (MODULE,)),),
        base_fingerprint="sha256:" + "0" * 64,
        memory={"weights": 1, "kv": 1, "adapters": 1, "free": 1},
    )

"""From a checked request to text: resolve the task, encode, submit, and decode what comes back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Coroutine,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any

from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.registry import Registry
from oneplusn.errors import InvalidRequest, OneplusnError, PromptTooLong, ServingError
from oneplusn.server.bridge import AsyncEngine, ModelInfo, TokenStream
from oneplusn.server.messages import Sampling, Submit, TokenOutput
from oneplusn.server.metrics import Metrics
from oneplusn.server.schemas import MAX_DEFAULT_TOKENS
from oneplusn.server.text import TextStream, Tokenizer

# Longer texts are encoded on a thread, so that other streams do not stall meanwhile.
_INLINE_CHARS = 16_384
_BLEND = "blend"


@dataclass(frozen=True, slots=True)
class Target:
    """What a request asked for, resolved to content when it arrived.

    Attributes:
        asked: The task, the blend, or None for the base, as the answer repeats it.
        label: Value of the metrics' task label.
        refs: What the engine serves it with.
        versions: `name@version` of every adapter in it, each once; none for the base.
    """

    asked: str | dict[str, float] | None
    label: str
    refs: tuple[TaskRef, ...] = ()
    versions: tuple[str, ...] = ()

    @property
    def adapter(self) -> str | None:
        """The versions as answers show them: joined by commas, None for the base."""
        return ",".join(self.versions) or None


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate.

    Attributes:
        task: A task, the weights of a blend, or None or the base's name for the base.
        param: Field of the request that named it.
    """

    task: str | Mapping[str, float] | None
    tokens: list[int]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    param: str = "model"


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer.

    Attributes:
        text: What is certain now; may be empty.
        output: The token that brought it.
        finish_reason: `stop` or `length` with the last piece.
    """

    text: str
    output: TokenOutput
    finish_reason: str | None


@dataclass(slots=True, eq=False)
class Generation:
    """A sequence on its way, and what it has become once it has ended.

    Attributes:
        target: What its task stood for when it was submitted.
        outputs: The tokens so far.
        text: The text so far.
        finish_reason: Why it ended, once it has.
        cached_tokens: Prompt tokens that the prefix cache held.
    """

    job: Job
    target: Target
    stream: TokenStream
    outputs: list[TokenOutput] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    cached_tokens: int = 0

    @property
    def ttft_seconds(self) -> float | None:
        """Seconds from the submission to the first token."""
        first = self.stream.first
        return None if first is None else first - self.stream.submitted


class Inference:
    """Turns jobs into text. One per server, on the event loop, once the model is loaded."""

    def __init__(
        self,
        engine: AsyncEngine,
        registry: Registry,
        metrics: Metrics,
        *,
        model: ModelInfo,
        base_name: str,
    ) -> None:
        self.model = model
        self.tokenizer = Tokenizer(model.folder)
        self._base_name = base_name
        self._engine = engine
        self._registry = registry
        self._metrics = metrics

    def resolve(self, task: str | Mapping[str, float] | None) -> Target:
        """Find what a task, a blend or the base's name stands for at this moment.

        Raises:
            UnknownTask: No active adapter has the task.
            InvalidRequest: A blend names the base.
        """
        if task is None or task == self._base_name:
            return Target(None, self._metrics.task_label(self._base_name))
        if isinstance(task, str):
            version = self._registry.resolve(task)
            label = self._metrics.task_label(task)
            return Target(task, label, (version.ref(task),), (version.label,))
        if self._base_name in task:
            msg = f"a blend adds to the base {self._base_name!r} anyway; leave it out"
            raise InvalidRequest(msg)
        versions = {name: self._registry.resolve(name) for name in task}
        refs = tuple(versions[name].ref(name, weight) for name, weight in task.items())
        labels = dict.fromkeys(version.label for version in versions.values())
        return Target(dict(task), self._metrics.task_label(_BLEND), refs, tuple(labels))

    async def encode(self, text: str) -> list[int]:
        """Turn a prompt into tokens."""
        if len(text) <= _INLINE_CHARS:
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Turn a conversation into tokens.

        Raises:
            InvalidRequest: The model's chat template cannot take it.
        """
        if sum(len(message["content"]) for message in messages) <= _INLINE_CHARS:
            return self.tokenizer.encode_chat(messages)
        return await asyncio.to_thread(self.tokenizer.encode_chat, messages)

    def room(self, tokens: Sequence[int], asked: int | None, *, param: str) -> int:
        """Return how many tokens may be generated after a prompt.

        Args:
            tokens: The prompt.
            asked: What the request limits it to; else all that the context leaves, up to
                `MAX_DEFAULT_TOKENS`.
            param: Field of the request that holds the prompt.

        Raises:
            PromptTooLong: The prompt, or it and the answer, exceed the context.
            InvalidRequest: The prompt is empty.
        """
        limit = self.model.max_model_len
        if not tokens:
            raise InvalidRequest("the prompt has no tokens; send at least one", param=param)
        if len(tokens) + (asked or 1) > limit:
            wanted = f" and {asked} to generate" if asked else ""
            msg = f"{len(tokens)} prompt tokens{wanted} exceed the context of {limit} tokens"
            raise PromptTooLong(f"{msg}; shorten one of them", param=param)
        return asked or min(limit - len(tokens), MAX_DEFAULT_TOKENS)

    def submit(self, job: Job) -> Generation:
        """Resolve a job's task and hand the job to the engine.

        Nothing is awaited in between, so no swap of the adapter can come between either: the
        engine sees the request before it sees the old version leave.

        Raises:
            UnknownTask: No active adapter has the task.
            InvalidRequest: A blend names the base.
            QueueFull: Too many sequences are unfinished.
            EngineStopped: The engine is not there.
        """
        try:
            target = self.resolve(job.task)
        except ServingError as error:
            error.param = job.param
            raise
        message = Submit(uuid.uuid4().hex, job.tokens, target.refs, job.sampling)
        generation = Generation(job, target, self._engine.stream(message))
        self._metrics.count("prompt_tokens", len(job.tokens), task=target.label)
        self._metrics.observe("request_prompt_tokens", len(job.tokens))
        return generation

    async def deltas(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        """Yield the pieces of one answer; it ends at a stop string, or when the engine ends it."""
        text = TextStream(self.tokenizer, generation.job.stop)
        async for output in generation.stream:
            generation.outputs.append(output)
            generation.cached_tokens = max(generation.cached_tokens, output.cached_tokens)
            # The token that ended the answer is a mark, not a part of it.
            token = None if output.finish == "stop" else output.token
            piece = "" if token is None else text.push(token)
            if output.finish is not None:
                piece += text.flush()
            reason = "stop" if text.finished else output.finish
            generation.text = text.text
            generation.finish_reason = reason
            yield Delta(piece, output, reason)
            if reason is not None:
                return

    def finish(self, generation: Generation) -> None:
        """Count a sequence, and cancel it if it has not ended."""
        generation.stream.close()
        label, tokens = generation.target.label, len(generation.outputs)
        reason = generation.finish_reason or "abort"
        self._metrics.count("generations", task=label, finish_reason=reason)
        self._metrics.count("generation_tokens", tokens, task=label)
        self._metrics.count("cached_prompt_tokens", generation.cached_tokens, task=label)
        if generation.finish_reason is not None:
            self._metrics.observe("request_generation_tokens", tokens)
            elapsed = time.perf_counter() - generation.stream.submitted
            self._metrics.observe("e2e_request_latency_seconds", elapsed)


class Batch:
    """The jobs of one request: submitted on entering, cancelled on leaving if they have not ended.

    Attributes:
        generations: One per job, in their order, once entered.
    """

    def __init__(self, inference: Inference, jobs: Sequence[Job]) -> None:
        self.generations: list[Generation] = []
        self._inference = inference
        self._jobs = jobs

    @property
    def targets(self) -> list[Target]:
        """What the jobs' tasks stood for when they were submitted."""
        return [generation.target for generation in self.generations]

    def __enter__(self) -> Batch:
        try:
            for job in self._jobs:
                self.generations.append(self._inference.submit(job))
        except OneplusnError:
            self._close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        for generation in self.generations:
            self._inference.finish(generation)

    async def run(self) -> Batch:
        """Generate all to their ends.

        Raises:
            OneplusnError: One of them failed; the others are cancelled.
        """
        with self:
            streams = [self._inference.deltas(generation) for generation in self.generations]
            await _together([_exhaust(stream) for stream in streams])
        return self

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield the pieces of all answers as they come, each with the answer's index.

        Raises:
            OneplusnError: One of them failed.
        """
        pieces: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(1)

        async def pump(index: int, generation: Generation) -> None:
            try:
                async for delta in self._inference.deltas(generation):
                    await pieces.put((index, delta))
                await pieces.put(None)
            except Exception as error:
                # It is raised where the pieces are read, not lost in this task.
                await pieces.put(error)

        pumps = [asyncio.create_task(pump(*pair)) for pair in enumerate(self.generations)]
        try:
            unfinished = len(pumps)
            while unfinished:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    unfinished -= 1
                else:
                    yield piece
        finally:
            for task in pumps:
                task.cancel()


async def _exhaust(deltas: AsyncIterator[Delta]) -> None:
    """Read to the end, for what that leaves in the generation."""
    async for _ in deltas:
        pass


async def _together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; the first failure ends the others."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()

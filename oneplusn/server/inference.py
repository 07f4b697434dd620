"""From a checked request to text: resolve the task, encode, submit, and decode what comes back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from oneplusn.adapters.registry import Registry
from oneplusn.errors import (
    DeadlineExceeded,
    InvalidRequest,
    OneplusnError,
    PromptTooLong,
    RequestCancelled,
    UnknownTask,
)
from oneplusn.server.bridge import AsyncEngine
from oneplusn.server.in_flight import InFlight
from oneplusn.server.messages import Ready, Sampling, Submit, TokenOutput
from oneplusn.server.metrics import EndedSequence, Metrics
from oneplusn.server.offload import offload
from oneplusn.server.schemas import MAX_DEFAULT_TOKENS, SamplingFields
from oneplusn.server.streams import TokenStream
from oneplusn.server.targets import Asked, Target, Targets
from oneplusn.server.text import TextStream, Tokenizer


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate.

    Attributes:
        task: A task, the weights of a blend, or None or the base's name for the base.
        tokens: The prompt.
        wanted: What the request says about sampling and stopping.
        limit: Most tokens to generate, if the request says.
        seed: Of its random numbers.
        logprobs: Likeliest tokens to list for each token; None = no log-probabilities at all.
        grammar: What the answer must match, as the engine takes it; None = anything.
        alias: Whether the task may be named in another server's way.
        task_param: Field of the request that named the task.
        prompt_param: Field of the request that holds the prompt.
    """

    task: Asked
    tokens: list[int]
    wanted: SamplingFields
    limit: int | None
    seed: int
    logprobs: int | None = None
    grammar: str | None = None
    alias: bool = False
    task_param: str = "model"
    prompt_param: str = "prompt"


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


@dataclass(frozen=True, slots=True)
class Plan:
    """A job that has been checked against what it asks for, ready to be submitted.

    Attributes:
        target: What its task stood for when the request arrived.
        wanted: The request's sampling fields, with the task's defaults filled in.
    """

    job: Job
    target: Target
    wanted: SamplingFields
    sampling: Sampling


@dataclass(slots=True, eq=False)
class Generation:
    """A sequence on its way, and what it has become once it has ended.

    Attributes:
        answer: The text so far, and what of it is held back.
        outputs: The tokens so far.
        finish_reason: Why it ended, once it has.
        stop_reason: The stop string or stop token that ended it, if one of the request's did.
        cached_tokens: Prompt tokens that the prefix cache held.
    """

    plan: Plan
    stream: TokenStream
    answer: TextStream
    outputs: list[TokenOutput] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return self.answer.text

    @property
    def job(self) -> Job:
        """What was asked for."""
        return self.plan.job

    @property
    def target(self) -> Target:
        """What its task stood for when the request arrived."""
        return self.plan.target

    @property
    def ending(self) -> str:
        """Why it ended, in a word, whether it came to an end of its own or not."""
        return self.finish_reason or _ending(self.stream.failure)

    @property
    def queued_seconds(self) -> float | None:
        """Seconds that it waited for its first step; known with its first token."""
        return self.outputs[0].queued_s if self.outputs else None

    @property
    def ttft_seconds(self) -> float | None:
        """Seconds from the submission to the first token."""
        first = self.stream.first
        return None if first is None else first - self.stream.submitted


def _ending(failure: OneplusnError | None) -> str:
    """Name what ended a sequence early; None = whoever asked for it went away."""
    if isinstance(failure, DeadlineExceeded):
        return "timeout"
    return "abort" if failure is None or isinstance(failure, RequestCancelled) else "error"


class Inference:
    """Turns jobs into text. One per server, on the event loop, once the model is loaded.

    Attributes:
        model: What the engine said of the base model.
        tokenizer: The model's.
        targets: Resolves the names in requests.
        in_flight: The requests that have not ended.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        registry: Registry,
        metrics: Metrics,
        *,
        model: Ready,
        base_name: str,
    ) -> None:
        self.model = model
        self.tokenizer = Tokenizer(model.folder)
        self.targets = Targets(registry, base_name, metrics.task_label)
        self._engine = engine
        self._metrics = metrics
        self.in_flight = InFlight()

    async def encode(
        self, texts: Sequence[str], *, param: str, add_special: bool = True
    ) -> list[list[int]]:
        """Turn prompts into tokens.

        Raises:
            PromptTooLong: One cannot fit, whatever its tokens are.
        """
        for text in texts:
            self._check_length(text, param)

        def work() -> list[list[int]]:
            return [self.tokenizer.encode(text, add_special=add_special) for text in texts]

        return await offload(work, list(texts))

    async def decode(self, tokens: Sequence[int]) -> str:
        """Turn tokens into text, special ones included."""
        work = partial(self.tokenizer.decode, tokens, skip_special=False)
        return await offload(work, tokens)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        switches: Mapping[str, bool] | None = None,
    ) -> list[int]:
        """Turn a conversation into tokens.

        Raises:
            InvalidRequest: The model's chat template cannot take it.
            PromptTooLong: It cannot fit, whatever its tokens are.
        """
        self._check_length("".join(message["content"] or "" for message in messages), "messages")
        work = partial(self.tokenizer.encode_chat, messages, tools=tools, switches=switches)
        return await offload(work, messages, tools)

    def plan(self, job: Job) -> Plan:
        """Check a job against what its task stands for now.

        Raises:
            UnknownTask: No active adapter has the task.
            AdapterCorrupt: The adapter's files are damaged.
            PromptTooLong: The prompt, or it and the answer, exceed the context.
            InvalidRequest: A field of it cannot be served.
        """
        try:
            if job.alias and isinstance(job.task, str):
                target = self.targets.resolve_alias(job.task)
            else:
                target = self.targets.resolve(job.task)
        except (UnknownTask, InvalidRequest) as error:
            error.param = job.task_param
            raise
        wanted = job.wanted.with_defaults(target.defaults)
        room = self._room(job, target.defaults.get("max_tokens"))
        sampling = wanted.sampling(max_tokens=room, seed=job.seed, logprobs=job.logprobs)
        self.check_tokens(job.tokens, job.prompt_param)
        self.check_tokens(sampling.logit_bias, "logit_bias")
        self.check_tokens(sampling.stop_token_ids, "stop_token_ids")
        return Plan(job, target, wanted, sampling)

    def submit(self, plan: Plan, *, salt: str, wake: asyncio.Event) -> Generation:
        """Hand a sequence to the engine.

        Nothing is awaited between its plan and this, so no swap of the adapter can come between
        either: the engine sees the request before it sees the old version leave.

        Args:
            plan: The sequence.
            salt: Whose cached prefixes it may use.
            wake: Set whenever `read` would find something.

        Raises:
            QueueFull: Too many sequences are unfinished.
            EngineStopped: The engine is not there.
        """
        job, wanted = plan.job, plan.wanted
        message = Submit(
            uuid.uuid4().hex,
            job.tokens,
            plan.target.refs,
            plan.sampling,
            salt=salt,
            timeout=wanted.timeout,
            grammar=job.grammar,
        )
        answer = TextStream(
            self.tokenizer,
            wanted.stop,
            include_stop=wanted.include_stop_str_in_output,
            skip_special=wanted.skip_special_tokens,
        )
        generation = Generation(plan, self._engine.stream(message, wake), answer)
        self._metrics.count("prompt_tokens", len(job.tokens), task=plan.target.label)
        self._metrics.observe("request_prompt_tokens", len(job.tokens))
        self._metrics.observe("request_params_max_tokens", plan.sampling.max_tokens)
        return generation

    def read(self, generation: Generation) -> Iterator[Delta]:
        """Yield the pieces of an answer that have come; it ends at a stop string, or by itself.

        The generation moves on with every piece.
        """
        wanted, answer = generation.plan.wanted, generation.answer
        for output in generation.stream.take():
            generation.outputs.append(output)
            generation.cached_tokens = max(generation.cached_tokens, output.cached_tokens)
            # The token that ended the answer is a mark, not a part of it.
            is_mark = output.finish == "stop" and not wanted.include_stop_str_in_output
            piece = "" if is_mark or output.token is None else answer.push(output.token)
            if output.finish is not None:
                piece += answer.flush()
            generation.finish_reason = "stop" if answer.finished else output.finish
            generation.stop_reason = answer.stopped_by
            if output.finish == "stop" and output.token in wanted.stop_token_ids:
                generation.stop_reason = answer.stopped_by or output.token
            yield Delta(piece, output, generation.finish_reason)
            if generation.finish_reason is not None:
                generation.stream.close()
                return

    def finish(self, generation: Generation) -> None:
        """Count a sequence, and cancel it if it has not ended."""
        stream, outputs = generation.stream, generation.outputs
        stream.close()
        end = EndedSequence(
            label=generation.target.label,
            reason=generation.ending,
            is_complete=generation.finish_reason is not None,
            tokens=len(outputs),
            cached_tokens=generation.cached_tokens,
            queued=generation.queued_seconds,
            first=generation.ttft_seconds,
            last=stream.last - stream.submitted,
            whole=time.perf_counter() - stream.submitted,
        )
        self._metrics.observe_sequence(end)

    def _check_length(self, text: str, param: str) -> None:
        """Refuse a text that cannot fit before time is spent on encoding it."""
        limit = self.model.max_model_len
        least = self.tokenizer.least_tokens(text)
        if least > limit:
            what = f"{len(text)} characters are at least {least} tokens"
            raise PromptTooLong(_too_long(what, limit), param=param)

    def check_tokens(self, tokens: Iterable[int], param: str) -> None:
        """Refuse what is no token of the model.

        Raises:
            InvalidRequest: One of them is none.
        """
        size = self.model.vocab_size
        bad = next((token for token in tokens if not 0 <= token < size), None)
        if bad is not None:
            msg = f"{param} holds {bad}, which is no token; this model has {size}"
            raise InvalidRequest(msg, param=param)

    def _room(self, job: Job, default: int | None) -> int:
        """Return how many tokens may be generated after a prompt.

        What the request limits it to; else what its task brings, or `MAX_DEFAULT_TOKENS`, as far
        as the context goes.
        """
        length, limit = len(job.tokens), self.model.max_model_len
        if not length:
            msg = "the prompt has no tokens; send at least one"
            raise InvalidRequest(msg, param=job.prompt_param)
        if length + (job.limit or 1) > limit:
            wanted = f" and {job.limit} to generate" if job.limit else ""
            what = f"{length} prompt tokens{wanted} exceed it; shorten one of them"
            raise PromptTooLong(_too_long(what, limit), param=job.prompt_param)
        return job.limit or min(limit - length, default or MAX_DEFAULT_TOKENS)


def _too_long(what: str, limit: int) -> str:
    """Word a refusal as clients recognise it: they look for these phrases, not for the code."""
    known = f"the prompt is too long: this model's maximum context length is {limit} tokens"
    return f"{known}, and {what}"

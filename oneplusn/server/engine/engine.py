"""The engine core: requests in, one mixed batch a step, tokens out. No asyncio, no clients.

Whoever drives it loops: hand over messages, `write_some` of the adapters that are on their way,
`step`, pass on what these two and `poll` return.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.layout import page_image
from oneplusn.adapters.pool import Pool
from oneplusn.errors import ConfigError, InvalidRequest, OneplusnError, PromptTooLong
from oneplusn.kernels.plan import BASE_SLOT
from oneplusn.server.engine.attention import KVCache
from oneplusn.server.engine.grammar import GrammarStore
from oneplusn.server.engine.kv_cache import BlockManager
from oneplusn.server.engine.memory import plan_memory
from oneplusn.server.engine.model import LoadedModel
from oneplusn.server.engine.residency import Residency
from oneplusn.server.engine.runner import Runner
from oneplusn.server.engine.sampler import SampledTokens, Sampler, TopTokens, failure_of
from oneplusn.server.engine.scheduler import Schedule, Scheduler, budget_for
from oneplusn.server.engine.sequence import Sequence, Status
from oneplusn.server.messages import (
    FinishReason,
    Freed,
    Loaded,
    Refusal,
    Stats,
    StepOutputs,
    StepStats,
    Submit,
    TokenOutput,
)

GRAMMAR_WAIT_S = 0.01
_log = logging.getLogger("oneplusn.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one engine.

    Attributes:
        kv_memory: Bytes of the KV cache; None = see `memory.plan_memory`.
        adapter_memory: Bytes of resident adapters; None = the same.
        max_model_len: Most tokens of a sequence; None = what the model can tell apart.
        max_num_seqs: Most sequences in one step.
        token_budget: Most tokens in one step; None = `budget_for` the sequences.
        block_size: Tokens of a KV block.
        max_tasks: Most tasks and blends that are resident at once.
        max_adapters: Most distinct adapters in one step; None = no limit.

    Raises:
        ConfigError: A limit is not positive.
    """

    kv_memory: int | None = None
    adapter_memory: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    token_budget: int | None = None
    block_size: int = 16
    max_tasks: int = 1024
    max_adapters: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"{name} is {value}; it must be at least 1"
                raise ConfigError(msg)


class Engine:
    """One base model, its adapters, and the requests in flight. Lives on one thread.

    Attributes:
        model: The base model.
        memory: How its memory is divided.
        scheduler: The requests in flight.
        residency: The adapters, here or on their way.
        runner: The model at work.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a model over, which must belong to no other engine.

        Args:
            model: The base model.
            config: Limits.
            clock: Seconds, for deadlines and budgets of time.

        Raises:
            ConfigError: The limits contradict each other or the model.
            MemoryPlanRefused: KV cache and adapters do not fit in what is free; with the plan.
        """
        config = config or EngineConfig()
        max_model_len = config.max_model_len or model.max_model_len
        if max_model_len > model.max_model_len:
            msg = f"max_model_len is {max_model_len}; this model reaches {model.max_model_len}"
            raise ConfigError(msg)
        self.model = model
        self.memory = plan_memory(
            model,
            kv_memory=config.kv_memory,
            adapter_memory=config.adapter_memory,
            block_size=config.block_size,
            wanted_tokens=max(max_model_len, config.max_num_seqs * max_model_len // 4),
        )
        blocks = BlockManager(self.memory.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            blocks,
            max_num_seqs=config.max_num_seqs,
            token_budget=config.token_budget or budget_for(config.max_num_seqs),
            max_model_len=max_model_len,
            eos_ids=model.eos_ids,
            max_adapters=config.max_adapters,
        )
        pool = Pool(
            model.sites,
            memory_bytes=self.memory.adapters,
            dtype=model.dtype,
            max_tasks=config.max_tasks,
        )
        self.residency = Residency(pool, clock)
        cache = KVCache(model.layers, blocks.num_blocks, config.block_size, model.dtype)
        self.runner = Runner(model, pool, cache)
        self._clock = clock
        self._sampler = Sampler(model.eos_ids)
        self._grammars = GrammarStore(model.folder, model.vocab_size, model.eos_ids)
        self._in_flight: dict[str, Sequence] = {}
        self._next_deadline = math.inf
        self._ended: list[TokenOutput] = []
        self._refused: list[Refusal] = []

    @property
    def pool(self) -> Pool:
        """The resident adapters."""
        return self.residency.pool

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to say."""
        return self.scheduler.has_work or bool(self._ended or self._refused)

    @property
    def is_writing(self) -> bool:
        """Whether `write_some` has something to write."""
        return self.residency.is_writing

    @property
    def stats(self) -> Stats:
        """Occupancy of the two budgets."""
        blocks = self.scheduler.blocks
        return Stats(
            kv_blocks=blocks.num_blocks,
            kv_blocks_free=blocks.num_free,
            pool_bytes=self.pool.num_bytes,
            pool_used_bytes=self.pool.used_bytes,
            resident=[version.digest for version in self.pool.resident()],
        )

    def submit(self, message: Submit) -> None:
        """Queue a request. What it refers to stays resident until it ends.

        One whose adapter is on its way waits for it, and holds back nobody.

        Raises:
            InvalidRequest: A token is none of the model's, the id is in flight, or the blend is
                malformed.
            PromptTooLong: The prompt leaves no room for an answer.
            AdapterNotFound: A task is neither resident nor on its way, or is being unloaded.
            PoolExhausted: There is no room for one more blend.
        """
        self._check(message)
        grammar = None
        if message.grammar is not None:
            room = self.scheduler.max_model_len - len(message.tokens)
            num_tokens = min(message.sampling.max_tokens, room)
            grammar = self._grammars.open(message.grammar, num_tokens)
        now = self._clock()
        seq = Sequence(
            message.id,
            message.tokens,
            message.sampling,
            slot=None,
            salt=message.salt,
            refs=message.refs,
            arrived=now,
            deadline=None if message.timeout is None else now + message.timeout,
            grammar=grammar,
            status=Status.WAITING_ADAPTER,
        )
        if self.residency.acquire(seq):
            seq.move_to(Status.WAITING)
        try:
            self.scheduler.add(seq)
        except PromptTooLong:
            self.residency.release(seq)
            raise
        self._in_flight[seq.id] = seq
        if seq.deadline is not None:
            self._next_deadline = min(self._next_deadline, seq.deadline)

    def cancel(self, request_id: str) -> None:
        """End a request at once and without a word; unknown ids are ignored."""
        self._end(request_id, "abort")

    def load(self, bundle: Bundle, *, pin: bool = False) -> int:
        """Make an adapter version resident here and now; return its bytes.

        Raises:
            AdapterIncompatible: It was made for another base model.
            AdapterInvalid: One of its tasks changes nothing.
            PoolExhausted: It does not fit beside what is in use.
        """
        image = page_image(bundle, self.model.sites, self.model.dtype)
        self.residency.load(image, pin=pin)
        return image.num_bytes

    def keep(self, digest: str, *, pin: bool | None = None) -> bool:
        """Take a load that needs no image, as the version is here or on its way; or return False.

        Args:
            digest: The version.
            pin: Whether it is kept from now on, whoever needs room; None = as before.
        """
        return self.residency.keep(digest, pin=pin)

    def begin_load(self, image: PageImage, *, pin: bool | None = None) -> None:
        """Queue a version for `write_some`; `poll` tells when it is resident, or why not.

        Args:
            image: The version; read until then.
            pin: Whether it is kept until it is unloaded, whoever needs room.
        """
        self.residency.begin_load(image, pin=pin)

    def write_some(self, seconds: float) -> None:
        """Write pieces of what is on its way, for about so long and one at least."""
        self._expire()
        settled = self.residency.write_some(seconds)
        for seq in settled.ready:
            self.scheduler.adapter_ready(seq)
        for seq, error in settled.failed:
            self._end(seq.id, "error")
            self._refused.append(_refusal(seq.id, error))

    def unload(self, digest: str, *, force: bool = False) -> None:
        """Drop a version as soon as no request refers to it, which `poll` tells.

        New requests for it are refused from now on.

        Args:
            digest: The version.
            force: End the requests that refer to it.
        """
        for seq in list(self._in_flight.values()) if force else ():
            if digest in seq.adapters:
                self._end(seq.id, "abort")
                error = "its adapter was unloaded by force"
                self._ended.append(TokenOutput(seq.id, finish="abort", error=error))
        self.residency.unload(digest)

    def poll(self) -> list[Loaded | Freed]:
        """Return which versions came or left since the last call."""
        return self.residency.poll()

    def warm(self) -> None:
        """Begin to load what grammars need, beside the steps."""
        self._grammars.warm()

    def step(self) -> StepOutputs:
        """Compute one batch of whatever is to be done, and say what came of it.

        Requests whose deadline has passed end first. A fault of the model ends the requests of
        this batch with an error, and no others.
        """
        started = time.perf_counter()
        self._expire()
        schedule = self.scheduler.schedule()
        outputs, self._ended = self._ended, []
        refused, self._refused = self._refused, []
        if schedule is None:
            if not outputs and not refused:
                self._grammars.wait(GRAMMAR_WAIT_S)
            return StepOutputs(outputs, StepStats(waiting=self.scheduler.num_waiting), refused)
        self._note_start(schedule)
        clusters = self._clusters(schedule)
        try:
            logits = self.runner.run(schedule)
            sampled = self._sampler.sample(logits, schedule.sampled)
        except Exception:
            # Whatever it was, it must not take down the requests that were not part of it.
            _log.exception("a step of %d sequences failed", len(schedule.items))
            outputs += self._fail(schedule)
        else:
            outputs += self._commit(schedule, sampled)
        return StepOutputs(outputs, self._step_stats(schedule, clusters, started), refused)

    def close(self) -> None:
        """Give the model back as it was, and drop the KV cache."""
        self.runner.close()
        self._grammars.close()

    def _check(self, message: Submit) -> None:
        """Refuse what the model or the sampler would stumble over.

        Raises:
            InvalidRequest: The id is in flight, or a token is none of the model's.
        """
        if message.id in self._in_flight:
            msg = f"the id {message.id!r} is in flight already; give every request its own"
            raise InvalidRequest(msg, param="id")
        if not message.tokens:
            msg = "the prompt has no tokens; send at least one"
            raise InvalidRequest(msg, param="prompt")
        sampling = message.sampling
        vocab_size = self.model.vocab_size
        named = {
            "prompt": message.tokens,
            "logit_bias": sampling.logit_bias,
            "stop_token_ids": sampling.stop_token_ids,
        }
        for param, tokens in named.items():
            bad = next((token for token in tokens if not 0 <= token < vocab_size), None)
            if bad is not None:
                msg = f"{param} holds {bad}, which is no token; this model has {vocab_size}"
                raise InvalidRequest(msg, param=param)

    def _clusters(self, schedule: Schedule) -> dict[int, tuple[str, ...]]:
        """Map the slots of a step, the base's left out, to their clusters."""
        slots = {item.seq.slot for item in schedule.items}
        return {
            slot: self.pool.slots[slot].cluster
            for slot in slots
            if slot is not None and slot != BASE_SLOT
        }

    def _expire(self) -> None:
        """End the requests whose deadline has passed."""
        now = self._clock()
        if now < self._next_deadline:
            return
        flying = self._in_flight.values()
        for seq in [seq for seq in flying if seq.deadline is not None and seq.deadline <= now]:
            self._end(seq.id, "timeout")
            self._ended.append(TokenOutput(seq.id, finish="timeout"))
        left = (seq.deadline for seq in flying if seq.deadline is not None)
        self._next_deadline = min(left, default=math.inf)

    def _note_start(self, schedule: Schedule) -> None:
        """Note when sequences had rows for the first time."""
        now = self._clock()
        for item in schedule.items:
            if item.seq.started is None:
                item.seq.started = now

    def _commit(self, schedule: Schedule, sampled: SampledTokens) -> list[TokenOutput]:
        """Record what a step computed, release what has finished, and say it."""
        seqs = schedule.sampled
        for seq, token in zip(seqs, sampled.tokens, strict=True):
            if failure_of(seq, token) is not None:
                self._end(seq.id, "error")
        for seq in self.scheduler.commit(schedule, sampled.tokens):
            self._release(seq)
        rows = zip(seqs, sampled.tokens, sampled.logprobs, sampled.top, strict=True)
        return [self._output(*row) for row in rows]

    def _output(
        self, seq: Sequence, token: int, logprob: float | None, top: TopTokens | None
    ) -> TokenOutput:
        """Say what a step did for one sequence."""
        if (failure := failure_of(seq, token)) is not None:
            return TokenOutput(seq.id, finish="error", error=failure)
        grammar = seq.grammar
        # One that was brought to its end for want of tokens has an end token all the same.
        is_mark = grammar is not None and seq.finish == "length" and token in self.model.eos_ids
        return TokenOutput(
            seq.id,
            None if is_mark else token,
            logprob=logprob,
            top=top,
            finish=seq.finish,
            cached_tokens=seq.num_cached,
            queued_s=_queued(seq),
        )

    def _fail(self, schedule: Schedule) -> list[TokenOutput]:
        """End every request of a step that broke off. Nothing that it wrote is ever read."""
        for item in schedule.items:
            self.cancel(item.seq.id)
        error = "the model failed in the batch that held this request; try again"
        return [TokenOutput(item.seq.id, finish="error", error=error) for item in schedule.items]

    def _end(self, request_id: str, reason: FinishReason) -> None:
        """End a request now, in whatever state it is."""
        seq = self.scheduler.abort(request_id, reason)
        if seq is not None:
            self._release(seq)

    def _release(self, seq: Sequence) -> None:
        """Let go of a request that has ended, and of its adapter."""
        del self._in_flight[seq.id]
        self.residency.release(seq)

    def _step_stats(
        self, schedule: Schedule, clusters: Mapping[int, tuple[str, ...]], started: float
    ) -> StepStats:
        return StepStats(
            num_tokens=schedule.num_tokens,
            num_prefill_tokens=schedule.num_tokens - schedule.num_decodes,
            num_decode_rows=schedule.num_decodes,
            distinct_tasks=len(clusters),
            distinct_clusters=len(set(clusters.values())),
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            kv_usage=self.scheduler.blocks.usage,
            step_seconds=time.perf_counter() - started,
            preemptions=len(schedule.preempted),
            cached_tokens=schedule.cached_tokens,
        )


def _queued(seq: Sequence) -> float | None:
    """Return how long a sequence waited for its first step, with its first token only."""
    if len(seq.output) > 1 or seq.started is None:
        return None
    return seq.started - seq.arrived


def _refusal(request_id: str, error: OneplusnError) -> Refusal:
    kind = type(error).__name__
    return Refusal(request_id, kind, error.message, error.code, error.param)

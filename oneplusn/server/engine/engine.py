"""The engine core: requests in, one mixed batch a step, tokens out. No asyncio, no clients."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.image import page_image
from oneplusn.adapters.pool import Pool
from oneplusn.errors import ConfigError, InvalidRequest, PromptTooLong
from oneplusn.kernels.plan import BASE_SLOT
from oneplusn.server.engine.attention import KVCache
from oneplusn.server.engine.kv_cache import BlockManager
from oneplusn.server.engine.memory import plan_memory
from oneplusn.server.engine.model import LoadedModel
from oneplusn.server.engine.runner import Runner
from oneplusn.server.engine.sampler import SampledTokens, Sampler
from oneplusn.server.engine.scheduler import Schedule, Scheduler
from oneplusn.server.engine.sequence import Sequence
from oneplusn.server.messages import Stats, StepOutputs, StepStats, Submit, TokenOutput

_log = logging.getLogger("oneplusn.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one engine.

    Attributes:
        kv_memory: Bytes of the KV cache; None = see `memory.plan_memory`.
        adapter_memory: Bytes of resident adapters; None = the same.
        max_model_len: Most tokens of a sequence; None = what the model can tell apart.
        max_num_seqs: Most sequences in one step.
        token_budget: Most tokens in one step.
        block_size: Tokens of a KV block.
        max_tasks: Most tasks and blends that are resident at once.

    Raises:
        ConfigError: A limit is not positive.
    """

    kv_memory: int | None = None
    adapter_memory: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    token_budget: int = 512
    block_size: int = 16
    max_tasks: int = 1024

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
        pool: The resident adapters.
        runner: The model at work.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig | None = None) -> None:
        """Take a model over, which must belong to no other engine.

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
            token_budget=config.token_budget,
            max_model_len=max_model_len,
            eos_ids=model.eos_ids,
        )
        self.pool = Pool(
            model.sites,
            memory_bytes=self.memory.adapters,
            dtype=model.dtype,
            max_tasks=config.max_tasks,
        )
        cache = KVCache(model.layers, blocks.num_blocks, config.block_size, model.dtype)
        self.runner = Runner(model, self.pool, cache)
        self._sampler = Sampler(model.eos_ids)
        self._in_flight: set[str] = set()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute."""
        return self.scheduler.has_work

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

        Raises:
            InvalidRequest: A token is none of the model's, the id is in flight, or the blend is
                malformed.
            PromptTooLong: The prompt leaves no room for an answer.
            AdapterNotFound: A task is not resident.
            PoolExhausted: There is no room for one more blend.
        """
        self._check(message)
        task_key = self.pool.task_key(message.refs)
        seq = Sequence(
            message.id,
            message.tokens,
            message.sampling,
            slot=self.pool.acquire(message.refs),
            task_key=task_key,
            salt=message.salt,
        )
        try:
            self.scheduler.add(seq)
        except PromptTooLong:
            self._release(seq)
            raise
        self._in_flight.add(seq.id)

    def cancel(self, request_id: str) -> None:
        """End a request at once and without a word; unknown ids are ignored."""
        seq = self.scheduler.abort(request_id)
        if seq is not None:
            self._release(seq)

    def load(self, bundle: Bundle) -> int:
        """Make an adapter version resident; return its bytes.

        Raises:
            AdapterIncompatible: It was made for another base model.
            AdapterInvalid: One of its tasks changes nothing.
            PoolExhausted: It does not fit beside what is in use.
        """
        image = page_image(bundle, self.model.sites, self.model.dtype)
        self.pool.load(image)
        return image.num_bytes

    def unload(self, digest: str) -> int:
        """Drop an adapter version; return the bytes freed.

        Raises:
            AdapterNotFound: It is not resident.
            AdapterError: A request uses it.
        """
        return self.pool.unload(digest)

    def step(self) -> StepOutputs:
        """Compute one batch of whatever is to be done, and say what came of it.

        A fault of the model ends the requests of this batch with an error, and no others.
        """
        started = time.perf_counter()
        schedule = self.scheduler.schedule()
        if schedule is None:
            return StepOutputs([], StepStats())
        clusters = self._clusters(schedule)
        try:
            logits = self.runner.run(schedule)
            sampled = self._sampler.sample(logits, schedule.sampled)
        except Exception:
            # Whatever it was, it must not take down the requests that were not part of it.
            _log.exception("a step of %d sequences failed", len(schedule.items))
            outputs = self._fail(schedule)
        else:
            outputs = self._commit(schedule, sampled)
        return StepOutputs(outputs, self._step_stats(schedule, clusters, started))

    def close(self) -> None:
        """Give the model back as it was, and drop the KV cache."""
        self.runner.close()

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

    def _commit(self, schedule: Schedule, sampled: SampledTokens) -> list[TokenOutput]:
        """Record what a step computed, release what has finished, and say it."""
        seqs = schedule.sampled
        for seq in self.scheduler.commit(schedule, sampled.tokens):
            self._release(seq)
        rows = zip(seqs, sampled.tokens, sampled.logprobs, sampled.top, strict=True)
        return [
            TokenOutput(
                seq.id,
                token,
                logprob=logprob,
                top=top,
                finish=seq.finish,
                cached_tokens=seq.num_cached,
            )
            for seq, token, logprob, top in rows
        ]

    def _fail(self, schedule: Schedule) -> list[TokenOutput]:
        """End every request of a step that broke off. Nothing that it wrote is ever read."""
        for item in schedule.items:
            self.cancel(item.seq.id)
        error = "the model failed in the batch that held this request; try again"
        return [TokenOutput(item.seq.id, finish="error", error=error) for item in schedule.items]

    def _release(self, seq: Sequence) -> None:
        """Let go of a request that has ended, and of its adapter."""
        self._in_flight.discard(seq.id)
        if seq.slot is not None:
            self.pool.release(seq.slot)

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

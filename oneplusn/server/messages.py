"""Messages between the API and the engine: all that one knows of the other.

To the engine go `Submit`, `Cancel`, `Load`, `Unload` and `Warm`; from it come `Ready`,
`StepOutputs` (one a step, not one a token), `Loaded`, `Freed`, `Stats` and `Fatal`. Each is a
tagged msgspec struct, so a union of them decodes without help. Adapters appear by digest only:
names, versions and aliases are the registry's business.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from oneplusn.adapters.prepared import BaseLayout, SiteInfo
from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]

MAX_LOGPROBS = 20


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one request picks its tokens, and when it ends.

    Attributes:
        max_tokens: Most tokens to generate, at least 1.
        temperature: Divisor of the logits; 0 = greedy.
        top_k: Keep the k most likely tokens; 0 = all.
        top_p: Keep the smallest set of tokens with this much probability, in (0, 1].
        min_p: Drop tokens less likely than this times the likeliest, in [0, 1].
        repetition_penalty: Divides positive and multiplies negative logits of seen tokens, in
            [0.01, 100]; beyond, fp32 overflows.
        presence_penalty: Subtracted from the logits of generated tokens, in [-2, 2].
        frequency_penalty: The same, times how often each was generated, in [-2, 2].
        seed: Fixes the random numbers; None = the engine draws one.
        stop_token_ids: Tokens that end the output, besides the model's own.
        ignore_eos: Go on after the model's own end tokens.
        min_tokens: End tokens are masked until so many tokens are there.
        logprobs: Log-probabilities of so many likeliest tokens (0 = of the chosen one alone).
        logit_bias: Added to the logits of these tokens, each in [-100, 100].

    Raises:
        InvalidRequest: A value is out of its range; `param` names it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] = {}

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0.01 <= penalty <= 100, "between 0.01 and 100")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, -2 <= value <= 2, "between -2 and 2")
        in_range = 0 <= self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, in_range, "between 0 and max_tokens")
        if self.logprobs is not None:
            in_range = 0 <= self.logprobs <= MAX_LOGPROBS
            _check("logprobs", self.logprobs, in_range, f"between 0 and {MAX_LOGPROBS}")
        for bias in self.logit_bias.values():
            _check("logit_bias", bias, -100 <= bias <= 100, "between -100 and 100")


def _check(param: str, value: float, in_range: bool, limit: str) -> None:
    """Refuse `value` unless it is in range.

    Raises:
        InvalidRequest: It is not.
    """
    if not in_range:
        msg = f"{param} is {value}; it must be {limit}"
        raise InvalidRequest(msg, param=param)


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a request.

    Attributes:
        id: Unique among the requests in flight.
        tokens: The prompt, at least one token.
        refs: The task or the blend; empty = the bare base model.
        sampling: How to sample, and when to end.
        salt: Requests share cached prefixes only within one salt (the tenant's).
        timeout: Seconds from its arrival after which the engine ends it; None = never.
        grammar: What the output must match, as `GrammarSpec` writes it; None = anything.
    """

    id: str
    tokens: list[int]
    refs: tuple[TaskRef, ...]
    sampling: Sampling
    salt: str = ""
    timeout: float | None = None
    grammar: str | None = None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request before the next step; unknown ids are ignored, as it may just have ended."""

    id: str


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """One token of one request, or its end without a token (cancelled, failed).

    Attributes:
        id: The request.
        token: The token; None when the request ended without one.
        logprob: Its log-probability under the raw logits, if asked for.
        top: The likeliest tokens with theirs, likeliest first, if asked for.
        finish: Why the request ended; None = more will come.
        cached_tokens: Prompt tokens whose keys and values came from the prefix cache.
        queued_s: With the first token, the seconds from the request's arrival to its first step.
        error: What went wrong, with `finish == "error"`, or who ended it, with "abort".
    """

    id: str
    token: int | None = None
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    finish: FinishReason | None = None
    cached_tokens: int = 0
    queued_s: float | None = None
    error: str | None = None


class StepStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step did, and how full the engine was after it.

    Attributes:
        num_tokens: Rows of the batch.
        num_prefill_tokens: Rows that belong to prompts (or to recomputation).
        num_decode_rows: Sequences that had exactly one row.
        distinct_tasks: Tasks and blends in the batch, the base not counted.
        distinct_clusters: Sets of adapters in the batch, the base not counted.
        running: Sequences that hold blocks.
        waiting: Sequences that wait for blocks, rows or an adapter.
        kv_usage: Share of the KV blocks in use by running sequences, 0 to 1.
        step_seconds: Duration of the step.
        preemptions: Sequences that lost their blocks in this step.
        cached_tokens: Prompt tokens that sequences admitted in this step found in the cache.
    """

    num_tokens: int = 0
    num_prefill_tokens: int = 0
    num_decode_rows: int = 0
    distinct_tasks: int = 0
    distinct_clusters: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    step_seconds: float = 0.0
    preemptions: int = 0
    cached_tokens: int = 0


class Refusal(msgspec.Struct, frozen=True):
    """A request that was not taken.

    Attributes:
        id: The request.
        kind: Class of the reason, one of `oneplusn.errors`.
        message: The reason.
        code: Its code.
        param: Field of the request at fault, if one is.
    """

    id: str
    kind: str
    message: str
    code: str
    param: str | None = None


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """Everything that one step has to tell, and which requests were refused before it."""

    outputs: list[TokenOutput]
    stats: StepStats
    refused: list[Refusal] = []


class Load(msgspec.Struct, frozen=True, tag=True):
    """Make an adapter version resident.

    Attributes:
        digest: The version.
        path: Its page image, a file.
        pin: Keep it until it is unloaded, whoever needs room; None = as it was before.
    """

    digest: str
    path: str
    pin: bool | None = False


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The version is resident and written whole, or `error` and `code` say why not."""

    digest: str
    num_bytes: int = 0
    error: str | None = None
    code: str | None = None


class Unload(msgspec.Struct, frozen=True, tag=True):
    """Take the version out of the pool once no request refers to it; `force` ends those."""

    digest: str
    force: bool = False


class Freed(msgspec.Struct, frozen=True, tag=True):
    """The version is not resident any more: unloaded, or evicted for another."""

    digest: str
    num_bytes: int


class Warm(msgspec.Struct, frozen=True, tag=True):
    """Load now what the first request with a grammar would otherwise wait for."""


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Occupancy of the engine's two budgets, in bytes and blocks."""

    kv_blocks: int
    kv_blocks_free: int
    pool_bytes: int
    pool_used_bytes: int
    resident: list[str]


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The base model is loaded and passed its probe.

    Attributes:
        model: As the settings name it.
        folder: Where its tokenizer lies.
        max_model_len: Longest prompt plus completion, in tokens.
        vocab_size: Number of tokens that the model knows.
        eos_ids: Tokens that end an answer.
        dtype: Of the pool's pages, as `bfloat16`.
        sites: Linears that adapters can reach.
        base_fingerprint: Identity of the weights.
        memory: Bytes by purpose: weights, kv, adapters, free.
    """

    model: str
    folder: str
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    dtype: str
    sites: tuple[SiteInfo, ...]
    base_fingerprint: str
    memory: dict[str, int]

    @property
    def layout(self) -> BaseLayout:
        """What must be known to lay an adapter out for this base."""
        return BaseLayout(self.sites, self.dtype, self.base_fingerprint)


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on; the process ends after this.

    Attributes:
        error: The reason.
        kind: Its class, one of `oneplusn.errors`.
    """

    error: str
    kind: str = "EngineStopped"


ToEngine = Submit | Cancel | Load | Unload | Warm
FromEngine = Ready | StepOutputs | Loaded | Freed | Stats | Fatal

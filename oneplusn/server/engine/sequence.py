"""State of one request inside the engine."""

from __future__ import annotations

import secrets
from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from oneplusn.adapters.refs import TaskRef
from oneplusn.server.messages import FinishReason, Sampling

if TYPE_CHECKING:
    from oneplusn.server.engine.grammar import Matcher


class Status(Enum):
    """Where a sequence is in its life.

        WAITING_ADAPTER ──► WAITING ◄──► RUNNING
               │               │            │
               └───────────────┴────────────┴──► FINISHED

    WAITING_ADAPTER: its adapter is on its way; it has no slot yet and no blocks.
    WAITING: it has a slot, and waits for KV blocks and a row. A preempted sequence comes back
        here, ahead of all that arrived after it.
    RUNNING: it holds KV blocks and has rows in the steps.
    FINISHED: it holds nothing; `finish` says why.
    """

    WAITING_ADAPTER = "waiting_adapter"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


MOVES: dict[Status, frozenset[Status]] = {
    Status.WAITING_ADAPTER: frozenset({Status.WAITING, Status.FINISHED}),
    Status.WAITING: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.WAITING, Status.FINISHED}),
    Status.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One request: its tokens, what of them is computed, and the blocks that hold it.

    The scheduler owns `status`, `arrival`, `finish` and the preemption counter; the block manager
    owns `num_computed`, `block_table` and `block_hashes`. Two sequences are equal only when they
    are the same object.

    Attributes:
        id: The request's id.
        prompt: Prompt tokens, at least one.
        sampling: How its tokens are picked.
        slot: Task slot in the adapter pool (0 = the bare base); None = no adapter acquired yet.
        task_key: Identity of the task's weights, part of the prefix key; set with the slot.
        salt: Tenant's share of the prefix key.
        refs: The task or blend that serves it; empty = the bare base.
        adapters: Digests of the versions that it needs.
        arrived: When it came, by the engine's clock in seconds.
        deadline: When it ends, finished or not; None = never.
        started: When a step first had rows of it; None = not yet.
        grammar: What its output must match; None = anything.
        output: Tokens generated so far; they survive preemption.
        status: Where it is; changed through `move_to` only.
        arrival: Position in the order of arrival, given by the scheduler.
        seed: Seed of its random numbers: the request's, or drawn here once.
        num_computed: Leading tokens whose keys and values are in the cache.
        num_cached: Of the prompt, the tokens found in the cache when it was first admitted.
        num_preemptions: How often it lost its blocks.
        block_table: KV block of every `block_size` tokens, in order.
        block_hashes: Chained hash of every full block of tokens, in order; grows only.
        finish: Why it ended, once it has.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    slot: int | None = 0
    task_key: str = "base"
    salt: str = ""
    refs: tuple[TaskRef, ...] = ()
    adapters: frozenset[str] = field(init=False)
    arrived: float = 0.0
    deadline: float | None = None
    started: float | None = None
    grammar: Matcher | None = None
    output: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    arrival: int = 0
    seed: int = field(init=False)
    num_computed: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_hashes: list[bytes] = field(default_factory=list)
    finish: FinishReason | None = None

    def __post_init__(self) -> None:
        given = self.sampling.seed
        self.seed = secrets.randbits(64) if given is None else given
        self.adapters = frozenset(ref.digest for ref in self.refs)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the output together."""
        return len(self.prompt) + len(self.output)

    @property
    def is_ready(self) -> bool:
        """Whether it can run; not while its grammar is being compiled."""
        return self.grammar is None or self.grammar.is_ready

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not yet computed; at least 1 until it is finished."""
        return self.num_tokens - self.num_computed

    @property
    def last_token(self) -> int:
        """The newest token."""
        return self.output[-1] if self.output else self.prompt[-1]

    @property
    def is_decoding(self) -> bool:
        """Whether its next step has one row that yields a token."""
        return self.num_pending == 1

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.status is Status.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Copy the tokens `start` to `stop - 1` of prompt and output together."""
        first = len(self.prompt)
        if start >= first:
            return self.output[start - first : stop - first]
        if stop <= first:
            return self.prompt[start:stop]
        return self.prompt[start:] + self.output[: stop - first]

    def move_to(self, status: Status) -> None:
        """Change the status along an arrow of `Status`."""
        assert status in MOVES[self.status], f"{self.id}: {self.status} -> {status}"
        self.status = status

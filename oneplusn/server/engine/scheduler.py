"""Decide which tokens of which sequences the next step computes. Knows no torch."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from operator import attrgetter

from oneplusn.errors import ConfigError, PromptTooLong
from oneplusn.server.engine.kv_cache import BlockManager
from oneplusn.server.engine.sequence import Sequence, Status
from oneplusn.server.messages import FinishReason

_arrival = attrgetter("arrival")


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Rows of one sequence in a step: its tokens `start` to `start + count - 1`.

    Attributes:
        seq: The sequence.
        start: First of its tokens to compute.
        count: How many.
        samples: Whether the last row yields the sequence's next token.
    """

    seq: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """The work of one step.

    Attributes:
        items: Decode items first (one row each), then prefill chunks; each in order of arrival.
        num_decodes: How many of them are decode items.
        num_tokens: Rows in all.
        preempted: Sequences that lost their blocks to make this step possible, youngest first.
        cached_tokens: Tokens that the sequences admitted by it found in the prefix cache.
    """

    items: tuple[Scheduled, ...]
    num_decodes: int
    num_tokens: int
    preempted: tuple[Sequence, ...]
    cached_tokens: int

    @property
    def sampled(self) -> list[Sequence]:
        """Sequences that get a token, in the order in which `commit` wants the tokens."""
        return [item.seq for item in self.items if item.samples]


@dataclass(slots=True)
class _Admission:
    """How far one step has got with admitting sequences.

    Attributes:
        expected: Hashes of the blocks that running prompts will publish.
        adapters: Versions that running sequences use.
        passed: Sequences passed over, for whatever reason.
        held: Sequences passed over, which are to start on such blocks.
        held_blocks: Blocks that these will take, at most.
        is_open: Whether the next sequence may be looked at.
    """

    expected: set[bytes] = field(default_factory=set)
    adapters: set[str] = field(default_factory=set)
    passed: int = 0
    held: int = 0
    held_blocks: int = 0
    is_open: bool = True


def budget_for(max_num_seqs: int) -> int:
    """Return the rows of a step that serve so many sequences well.

    More make a prompt hold up those who wait for their next token, and compute it no faster: with
    eight streams and prompts of 512 tokens (134.5 M model, two cores) p99 between tokens was 63, 98
    and 348 ms at 64, 128 and 512 rows, the first token of a prompt came after 472, 400 and 370.
    """
    return max(128, 2 * max_num_seqs)


class Scheduler:
    """Continuous batching, first come first served, under a budget of tokens a step.

    Each step runs one row of every sequence that decodes, then fills the budget with prompt
    chunks in order of arrival. Blocks for all known tokens are taken on admission, so only
    decoding can run short; then the youngest running sequences lose their blocks and wait
    again, before all that arrived after them. Their tokens are recomputed, less what the
    prefix cache still has.

    A sequence that could start on a block which a running prompt is about to compute is held back
    until that block is there: the answers to one prompt share its keys and values. Those behind it
    may pass, as long as they leave it a place and its blocks; its share of the budget is before
    theirs all the same. It waits for a running sequence that computes on, or starts itself when
    that one is gone, so nothing waits for ever.

    Owns all sequences that are not finished, and their blocks. Lives on the engine's thread.

    Invariants:
        * `running` and `waiting` are sorted by arrival; no sequence is in two of `running`,
          `waiting` and `waiting_adapter`; their status says in which it is.
        * Only running sequences hold blocks. `len(running) <= max_num_seqs <= token_budget`, so
          every sequence that decodes has a row in every step.
        * Running sequences use `max_adapters` adapters at most, or one of them runs alone.
        * A sequence is shorter than `max_model_len`, which the cache can hold: alone, it fits.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        token_budget: int,
        max_model_len: int,
        eos_ids: Iterable[int] = (),
        max_adapters: int | None = None,
    ) -> None:
        """Start empty.

        Args:
            blocks: The KV cache's blocks, used by no one else.
            max_num_seqs: Most sequences that run at once.
            token_budget: Most tokens in one step, at least `max_num_seqs`.
            max_model_len: Most tokens of a sequence, prompt and output together; lowered to
                what the cache holds.
            eos_ids: Tokens that end a sequence unless it ignores them.
            max_adapters: Most distinct adapters that run at once; a sequence that would exceed it
                waits, and those behind it too. A blend of more runs alone. None = no limit.

        Raises:
            ConfigError: The budget has no room for one row of every sequence.
        """
        if not 1 <= max_num_seqs <= token_budget:
            msg = (
                f"token budget {token_budget} is too small for one row of each of {max_num_seqs} "
                f"sequences; raise the budget or lower the number of sequences"
            )
            raise ConfigError(msg)
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.token_budget = token_budget
        self.max_model_len = min(max_model_len, blocks.num_blocks * blocks.block_size)
        self.max_adapters = max_adapters
        self.eos_ids = frozenset(eos_ids)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.waiting_adapter: dict[str, Sequence] = {}
        self._sequences: dict[str, Sequence] = {}
        self._num_arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence runs or could; those that wait for an adapter do not count."""
        return bool(self.running or self.waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks, for rows or for an adapter."""
        return len(self.waiting) + len(self.waiting_adapter)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence, WAITING with a slot or WAITING_ADAPTER without.

        Raises:
            PromptTooLong: It leaves no room for a single token of output.
        """
        assert seq.id not in self._sequences, f"{seq.id} is here already"
        assert seq.prompt, f"{seq.id} has nothing to compute"
        assert (seq.slot is None) == (seq.status is Status.WAITING_ADAPTER)
        if seq.num_prompt >= self.max_model_len:
            msg = (
                f"the prompt has {seq.num_prompt} tokens and the context holds "
                f"{self.max_model_len} with the output; shorten it to {self.max_model_len - 1}"
            )
            raise PromptTooLong(msg)
        seq.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._sequences[seq.id] = seq
        if seq.status is Status.WAITING_ADAPTER:
            self.waiting_adapter[seq.id] = seq
        else:
            self.waiting.append(seq)

    def adapter_ready(self, seq: Sequence) -> None:
        """Let a sequence in WAITING_ADAPTER compete for blocks, in its old place by arrival."""
        assert seq.slot is not None, f"{seq.id} has no slot"
        del self.waiting_adapter[seq.id]
        seq.move_to(Status.WAITING)
        insort(self.waiting, seq, key=_arrival)

    def schedule(self) -> Schedule | None:
        """Pick the rows of the next step; None when nothing runs or is ready to.

        Moves sequences between WAITING and RUNNING, takes and gives back blocks. Every schedule
        must be committed before the next one is made.
        """
        if not self.has_work:
            return None
        decodes, preempted = self._decode_items()
        chunks, cached = self._prefill_items(self.token_budget - len(decodes))
        if not decodes and not chunks:
            return None
        return Schedule(
            items=(*decodes, *chunks),
            num_decodes=len(decodes),
            num_tokens=len(decodes) + sum(item.count for item in chunks),
            preempted=tuple(preempted),
            cached_tokens=cached,
        )

    def commit(self, schedule: Schedule, tokens: Tokens[int]) -> list[Sequence]:
        """Record a step that ran: rows are computed, tokens appended, ends recognised.

        Sequences aborted since `schedule` are passed over; their tokens are dropped.

        Args:
            schedule: What ran.
            tokens: One for each of `schedule.sampled`, in that order.

        Returns:
            The sequences that finished; they hold no blocks any more.
        """
        assert len(tokens) == len(schedule.sampled)
        sampled = iter(tokens)
        finished = []
        for item in schedule.items:
            seq = item.seq
            token = next(sampled) if item.samples else None
            if seq.is_finished:
                continue
            self.blocks.advance(seq, item.count)
            if token is None:
                continue
            seq.output.append(token)
            reason = self._finish_reason(seq)
            if reason is not None:
                self._finish(seq, reason)
                finished.append(seq)
        return finished

    def abort(self, seq_id: str, reason: FinishReason = "abort") -> Sequence | None:
        """End a sequence in whatever state it is, and free what it holds.

        Returns:
            The sequence, or None when none of this id is here (it may have just finished).
        """
        seq = self._sequences.get(seq_id)
        if seq is not None:
            self._finish(seq, reason)
        return seq

    def check_integrity(self) -> None:
        """Assert the invariants of this class and of the block manager."""
        for queue in (self.running, self.waiting):
            arrivals = [seq.arrival for seq in queue]
            assert arrivals == sorted(set(arrivals))
        where = [*self.running, *self.waiting, *self.waiting_adapter.values()]
        assert {seq.id: seq for seq in where} == self._sequences
        assert len(where) == len(self._sequences)
        assert all(seq.status is Status.RUNNING for seq in self.running)
        assert all(seq.status is Status.WAITING for seq in self.waiting)
        assert all(not seq.block_table for seq in where if seq.status is not Status.RUNNING)
        assert len(self.running) <= self.max_num_seqs
        adapters = {digest for seq in self.running for digest in seq.adapters}
        assert self._is_within_cap(adapters) or len(self.running) == 1
        self.blocks.check_integrity()

    def _decode_items(self) -> tuple[list[Scheduled], list[Sequence]]:
        """Give every sequence that decodes its row; preempt the youngest while blocks run out."""
        items: list[Scheduled] = []
        preempted: list[Sequence] = []
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            index += 1
            if not seq.is_decoding:
                continue
            # The victim is `seq` or younger, so it is not among the items yet.
            while seq.status is Status.RUNNING and not self.blocks.extend(seq):
                preempted.append(self._preempt_youngest())
            if seq.status is Status.RUNNING:
                items.append(Scheduled(seq, seq.num_computed, 1, samples=True))
        return items, preempted

    def _prefill_items(self, budget: int) -> tuple[list[Scheduled], int]:
        """Fill the budget with chunks of prompts, running and waiting ones in order of arrival.

        Returns:
            The chunks, and the tokens that those admitted found in the prefix cache.
        """
        prefilling = [seq for seq in self.running if not seq.is_decoding]
        admission = self._open_admission(prefilling)
        items: list[Scheduled] = []
        cached = 0
        while budget > 0:
            before = prefilling[0].arrival if prefilling else None
            seq = self._admit(admission, before)
            if seq is not None:
                cached += seq.num_computed
            elif prefilling:
                seq = prefilling.pop(0)
            else:
                break
            count = min(seq.num_pending, budget)
            items.append(Scheduled(seq, seq.num_computed, count, count == seq.num_pending))
            budget -= count
        return items, cached

    def _open_admission(self, prefilling: Iterable[Sequence]) -> _Admission:
        """Look at what runs, if anything waits."""
        admission = _Admission()
        if self.waiting:
            for seq in prefilling:
                admission.expected.update(self.blocks.expected(seq))
            for seq in self.running:
                admission.adapters |= seq.adapters
        return admission

    def _admit(self, admission: _Admission, before: int | None) -> Sequence | None:
        """Move the next waiting sequence to RUNNING, if it may and can.

        A block for each running sequence is left free: without that, the newcomer would be
        preempted as soon as the others go on.

        Args:
            admission: What this step knows of admitting.
            before: Only a sequence that arrived before this one.
        """
        while admission.is_open and admission.passed < len(self.waiting):
            if len(self.running) + admission.held >= self.max_num_seqs:
                return None
            seq = self.waiting[admission.passed]
            if before is not None and seq.arrival > before:
                return None
            if not seq.is_ready:
                admission.passed += 1
                continue
            if self.blocks.next_needed(seq) in admission.expected:
                admission.passed += 1
                admission.held += 1
                admission.held_blocks += -(-seq.num_tokens // self.blocks.block_size)
                continue
            admission.is_open = self._start(seq, admission)
            return seq if admission.is_open else None
        return None

    def _start(self, seq: Sequence, admission: _Admission) -> bool:
        """Let a waiting sequence run if its adapters are within the cap and it gets blocks."""
        adapters = admission.adapters | seq.adapters
        if self.running and not self._is_within_cap(adapters):
            return False
        if not self.blocks.allocate(seq, spare=len(self.running) + admission.held_blocks):
            return False
        self.waiting.remove(seq)
        if seq.num_preemptions == 0:
            seq.num_cached = seq.num_computed
        seq.move_to(Status.RUNNING)
        insort(self.running, seq, key=_arrival)
        admission.adapters = adapters
        admission.expected.update(self.blocks.expected(seq))
        return True

    def _is_within_cap(self, adapters: set[str]) -> bool:
        return self.max_adapters is None or len(adapters) <= self.max_adapters

    def _preempt_youngest(self) -> Sequence:
        """Take the blocks of the youngest running sequence and let it wait again."""
        seq = self.running.pop()
        self.blocks.free(seq)
        seq.num_preemptions += 1
        seq.move_to(Status.WAITING)
        insort(self.waiting, seq, key=_arrival)
        return seq

    def _finish_reason(self, seq: Sequence) -> FinishReason | None:
        """Say whether the token just appended is the last one, and why."""
        sampling, token = seq.sampling, seq.last_token
        if seq.grammar is not None and token in self.eos_ids:
            return "length" if seq.grammar.was_cut else "stop"
        if len(seq.output) > sampling.min_tokens and (
            token in sampling.stop_token_ids or (token in self.eos_ids and not sampling.ignore_eos)
        ):
            return "stop"
        if len(seq.output) >= sampling.max_tokens or seq.num_tokens >= self.max_model_len:
            return "length"
        return None

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Take a sequence out of its queue and free its blocks."""
        if seq.status is Status.RUNNING:
            self.blocks.free(seq)
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        else:
            del self.waiting_adapter[seq.id]
        del self._sequences[seq.id]
        seq.finish = reason
        seq.move_to(Status.FINISHED)

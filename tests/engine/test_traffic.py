"""Random traffic through scheduler, blocks and batch, against a model that needs no tensors."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from oneplusn.server.engine.batch import build_batch
from oneplusn.server.engine.kv_cache import BlockManager
from oneplusn.server.engine.scheduler import Schedule, Scheduler
from oneplusn.server.engine.sequence import Sequence, Status
from oneplusn.server.messages import Sampling

EOS = 2
VOCABULARY = 11
BUDGET = 12
MAX_LEN = 26


def next_token(slot: int, tokens: list[int]) -> int:
    """Stand in for the model: any change in any earlier token or in the task changes the result."""
    state = slot
    for token in tokens:
        state = (state * 31 + token + 1) % 10007
    return state % VOCABULARY


def answer(seq: Sequence) -> tuple[list[int], str]:
    """Generate alone, without scheduler or cache."""
    sampling, output = seq.sampling, []
    while True:
        token = next_token(seq.slot, seq.prompt + output)
        output.append(token)
        ends = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        if ends and len(output) > sampling.min_tokens:
            return output, "stop"
        if len(output) == sampling.max_tokens or len(seq.prompt) + len(output) == MAX_LEN:
            return output, "length"


class Traffic(RuleBasedStateMachine):
    """Requests come, go and wait for adapters while steps run on a model that reads its cache."""

    def __init__(self) -> None:
        super().__init__()
        # 9 blocks of 3: one sequence of 26 tokens takes all of them, so preemption is common.
        self.blocks = BlockManager(9, 3)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=4, token_budget=BUDGET, max_model_len=MAX_LEN, eos_ids=[EOS]
        )
        self.cache: dict[int, tuple[int, int]] = {}
        self.seqs: list[Sequence] = []

    @rule(
        # Few different tokens, so that prompts repeat each other's blocks, whole or displaced.
        head=st.integers(0, 4).map(lambda blocks: [1, 1, 0] * blocks),
        tail=st.lists(st.integers(0, 1), min_size=1, max_size=7),
        task=st.integers(0, 2),
        max_tokens=st.integers(1, 30),
        min_tokens=st.integers(0, 4),
        ignore_eos=st.booleans(),
        late=st.booleans(),
    )
    def add(self, head, tail, task, max_tokens, min_tokens, ignore_eos, late):
        sampling = Sampling(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            ignore_eos=ignore_eos,
            stop_token_ids=(3,),
        )
        seq = Sequence(str(len(self.seqs)), head + tail, sampling, slot=task, task_key=f"t{task}")
        if late:
            seq.slot, seq.status = None, Status.WAITING_ADAPTER
        self.scheduler.add(seq)
        self.seqs.append(seq)

    @precondition(lambda self: self.scheduler.waiting_adapter)
    @rule(data=st.data())
    def adapter_comes(self, data):
        self.give_adapter(data.draw(st.sampled_from(sorted(self.scheduler.waiting_adapter))))

    def give_adapter(self, seq_id: str) -> None:
        seq = self.scheduler.waiting_adapter[seq_id]
        seq.slot, seq.task_key = 1, "t1"
        self.scheduler.adapter_ready(seq)

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def abort(self, data):
        seq = data.draw(st.sampled_from(self.seqs))
        was_finished = seq.is_finished
        assert (self.scheduler.abort(seq.id) is None) is was_finished

    @rule(interrupt=st.booleans())
    def step(self, interrupt=False):
        schedule = self.scheduler.schedule()
        if schedule is None:
            assert not self.scheduler.has_work
            return
        self.check_order(schedule)
        tokens = self.run(schedule)
        if interrupt:
            self.scheduler.abort(schedule.items[-1].seq.id)
        self.scheduler.commit(schedule, tokens)

    @invariant()
    def integrity(self):
        self.scheduler.check_integrity()

    def teardown(self):
        for seq_id in sorted(self.scheduler.waiting_adapter):
            self.give_adapter(seq_id)
        while self.scheduler.has_work:
            self.step()
        assert self.blocks.num_free == self.blocks.num_blocks
        for seq in self.seqs:
            if seq.finish == "abort":
                expected = answer(seq)[0] if seq.slot is not None else []
                assert seq.output == expected[: len(seq.output)]
            else:
                assert (seq.output, seq.finish) == answer(seq)

    def check_order(self, schedule: Schedule) -> None:
        decodes, chunks = (
            schedule.items[: schedule.num_decodes],
            schedule.items[schedule.num_decodes :],
        )
        assert schedule.num_tokens == sum(item.count for item in schedule.items) <= BUDGET
        assert {item.seq for item in schedule.items} <= set(self.scheduler.running)
        assert all(item.count == 1 for item in decodes)
        assert all(item.count >= 1 for item in chunks)
        assert not any(item.count < item.seq.num_pending for item in chunks[:-1])
        if not schedule.preempted:
            ready = [seq for seq in self.scheduler.running if seq.is_decoding]
            assert set(ready) <= {item.seq for item in schedule.items}

    def run(self, schedule: Schedule) -> list[int]:
        """Compute the rows from the flat arrays alone, as the model does."""
        batch = build_batch(schedule, self.blocks.block_size)
        for row, place in enumerate(batch.kv_pos.tolist()):
            self.cache[place] = (int(batch.token_ids[row]), int(batch.row_slots[row]))
        tokens = []
        for index, item in enumerate(schedule.items):
            length = int(batch.context_lens[index])
            table = batch.block_tables[index].tolist()
            block_and_offset = (divmod(position, 3) for position in range(length))
            read = [self.cache[table[block] * 3 + offset] for block, offset in block_and_offset]
            assert [token for token, _ in read] == item.seq.token_ids(0, length)
            assert {slot for _, slot in read} == {item.seq.slot}
            if item.samples:
                tokens.append(next_token(item.seq.slot, [token for token, _ in read]))
        return tokens


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=100, stateful_step_count=40)

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oneplusn.server.engine.batch import build_batch
from oneplusn.server.engine.scheduler import Schedule, Scheduled
from oneplusn.server.engine.sequence import Sequence
from oneplusn.server.messages import Sampling


def item(tokens: list[int], start: int, count: int, table: list[int], slot: int = 0) -> Scheduled:
    seq = Sequence("r", tokens, Sampling(max_tokens=1), slot=slot)
    seq.block_table = array("i", table)
    seq.num_computed = start
    return Scheduled(seq, start, count, samples=start + count == len(tokens))


def schedule(*items: Scheduled) -> Schedule:
    num_decodes = sum(item.count == 1 for item in items)
    num_tokens = sum(item.count for item in items)
    return Schedule(items, num_decodes, num_tokens, preempted=(), cached_tokens=0)


def test_two_decode_rows_a_last_chunk_and_a_first_chunk():
    batch = build_batch(
        schedule(
            item([10, 11, 12, 13, 14], 4, 1, table=[7, 2], slot=3),
            item([20, 21], 1, 1, table=[5]),
            item([30, 31, 32, 33, 34, 35], 3, 3, table=[0, 4], slot=1),
            item([40, 41, 42, 43, 44, 45, 46, 47, 48], 0, 2, table=[9, 8, 6], slot=3),
        ),
        block_size=4,
    )
    assert batch.token_ids.tolist() == [14, 21, 33, 34, 35, 40, 41]
    assert batch.positions.tolist() == [4, 1, 3, 4, 5, 0, 1]
    assert batch.kv_pos.tolist() == [8, 21, 3, 16, 17, 36, 37]
    assert batch.query_start.tolist() == [0, 1, 2, 5, 7]
    assert batch.context_lens.tolist() == [5, 2, 6, 2]
    assert batch.block_tables.tolist() == [[7, 2, 0], [5, 0, 0], [0, 4, 0], [9, 8, 6]]
    assert batch.row_slots.tolist() == [3, 0, 1, 1, 1, 3, 3]
    assert batch.sample_rows.tolist() == [0, 1, 4]
    assert batch.num_decodes == 2


def test_dtypes_are_those_that_attention_wants():
    batch = build_batch(schedule(item([1, 2], 1, 1, table=[0])), block_size=16)
    for name in ("token_ids", "positions", "kv_pos", "sample_rows"):
        assert getattr(batch, name).dtype == np.int64
    for name in ("query_start", "context_lens", "block_tables", "row_slots"):
        assert getattr(batch, name).dtype == np.int32


def test_a_batch_that_samples_nothing_has_no_sample_rows():
    batch = build_batch(schedule(item([1, 2, 3], 0, 2, table=[0])), block_size=16)
    assert batch.sample_rows.shape == (0,)


def test_positions_in_a_large_cache_do_not_wrap_at_32_bits():
    batch = build_batch(schedule(item([1], 0, 1, table=[2**28])), block_size=16)
    assert batch.kv_pos.tolist() == [2**32]


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_every_row_is_where_its_own_sequence_says(rows, block_size):
    items = []
    for index, (start, count) in enumerate(rows):
        tokens = [1000 * index + position for position in range(start + count)]
        num_blocks = -(-len(tokens) // block_size)
        table = [100 * index + block for block in range(num_blocks)]
        items.append(item(tokens, start, count, table, slot=index))
    batch = build_batch(schedule(*items), block_size)
    row = 0
    for index, (start, count) in enumerate(rows):
        for position in range(start, start + count):
            block = 100 * index + position // block_size
            assert batch.token_ids[row] == 1000 * index + position
            assert batch.positions[row] == position
            assert batch.kv_pos[row] == block * block_size + position % block_size
            assert batch.row_slots[row] == index
            row += 1
        assert batch.query_start[index + 1] == row
    assert row == len(batch.token_ids)

"""Turn a schedule into the flat arrays that a forward pass reads. Knows numpy, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oneplusn.server.engine.scheduler import Schedule

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Inputs of one step, T rows of B sequences, M of which yield a token.

    Attributes:
        token_ids: int64 [T], the input tokens, sequence after sequence.
        positions: int64 [T], place of each token in its sequence.
        kv_pos: int64 [T], place of its keys and values in the cache: block * block_size + offset.
        query_start: int32 [B + 1], first row of each sequence, then T.
        context_lens: int32 [B], tokens that its last row sees, itself included.
        block_tables: int32 [B, max_blocks], padded with 0.
        row_slots: int32 [T], task slot of each row.
        sample_rows: int64 [M], rows whose logits are sampled, in the order of the schedule.
        num_decodes: The first so many sequences have exactly one row each.
    """

    token_ids: Int64
    positions: Int64
    kv_pos: Int64
    query_start: Int32
    context_lens: Int32
    block_tables: Int32
    row_slots: Int32
    sample_rows: Int64
    num_decodes: int


def build_batch(schedule: Schedule, block_size: int) -> StepBatch:
    """Lay the rows of a schedule out flat, sequence after sequence.

    Args:
        schedule: What to run; decode rows come first in it.
        block_size: Tokens of a KV block.
    """
    items = schedule.items
    num_seqs = len(items)
    tokens: list[int] = []
    for item in items:
        if item.count == 1 and item.samples:
            tokens.append(item.seq.last_token)
        else:
            tokens += item.seq.token_ids(item.start, item.start + item.count)
    starts = np.fromiter((item.start for item in items), np.int64, num_seqs)
    counts = np.fromiter((item.count for item in items), np.int64, num_seqs)
    query_start = np.zeros(num_seqs + 1, np.int64)
    np.cumsum(counts, out=query_start[1:])
    row_seq = np.repeat(np.arange(num_seqs), counts)
    positions = np.arange(len(tokens)) + (starts - query_start[:-1])[row_seq]
    block_tables = _block_tables(schedule)
    block, offset = np.divmod(positions, block_size)
    slots = np.fromiter((item.seq.slot for item in items), np.int32, num_seqs)
    samples = np.fromiter((item.samples for item in items), np.bool_, num_seqs)
    return StepBatch(
        token_ids=np.array(tokens, np.int64),
        positions=positions,
        kv_pos=block_tables[row_seq, block] * np.int64(block_size) + offset,
        query_start=query_start.astype(np.int32),
        context_lens=(starts + counts).astype(np.int32),
        block_tables=block_tables,
        row_slots=slots[row_seq],
        sample_rows=query_start[1:][samples] - 1,
        num_decodes=schedule.num_decodes,
    )


def _block_tables(schedule: Schedule) -> Int32:
    """Stack the block tables of all sequences, padded with 0. Returns int32 [B, max_blocks]."""
    tables = [item.seq.block_table for item in schedule.items]
    lengths = np.fromiter(map(len, tables), np.int64, len(tables))
    stacked = np.zeros((len(tables), int(lengths.max())), np.int32)
    filled = np.arange(stacked.shape[1]) < lengths[:, None]
    stacked[filled] = np.frombuffer(b"".join(tables), np.int32)
    return stacked

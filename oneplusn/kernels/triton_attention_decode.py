"""The Triton kernels of attention for decode rows: split by split, then the splits merged.

How a context is cut depends on its length alone, so a row has the same bits in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oneplusn.kernels.triton_attention import (
    LOG2E,
    NOTHING,
    WIDE,
    attend,
    load_queries,
)


@triton.jit
def _splits(length, WINDOW: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Return how a context is cut for its last row: by its length alone.

    A long context has longer splits, not more of them.

    Returns:
        The first token that is seen, the tokens of a split, the number of the first split that is
        seen, and how many there are.
    """
    oldest = length * 0
    if WINDOW is not None:
        oldest = tl.maximum(length - WINDOW, 0)
    # One less, for a window may begin within a split.
    most: tl.constexpr = SPLIT * (MAX_SPLITS - 1)
    size = SPLIT * tl.maximum((length - oldest + most - 1) // most, 1)
    first = oldest // size
    return oldest, size, first, (length + size - 1) // size - first


@triton.jit
def _find_split(
    item, lengths, num_seqs,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Return the sequence that has split number `item` of all, and which of its splits it is.

    Beyond the last split, the sequence is `num_seqs`.
    """
    seq, before, counted = 0, 0, 0
    for first in range(0, num_seqs, WIDE):
        i = first + tl.arange(0, WIDE)
        length = tl.load(lengths + i, mask=i < num_seqs, other=0)
        _, _, _, count = _splits(length, WINDOW, SPLIT, MAX_SPLITS)
        passed = (i < num_seqs) & (counted + tl.cumsum(count, 0) <= item)
        seq += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, count, 0), 0)
        counted += tl.sum(count, 0)
    return seq, item - before


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def decode_kernel(
    q, k_cache, v_cache, parts, weights, block_tables, context_lens,
    num_seqs, table_stride, q_row_stride, q_head_stride, k_head_stride, v_head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KD: tl.constexpr, VD: tl.constexpr,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Attend from one row each of the first sequences, split by split, by any number of programs.

    Semantics:
        An item is (sequence, split, KV head), the last running fastest.
        parts fp32 [num_seqs, MAX_SPLITS, HEADS * GROUP, VD]: what the split alone would answer.
        weights fp32 [num_seqs, MAX_SPLITS, HEADS * GROUP]: log2 of its sum of exponentials.
        Splits that a sequence does not have are left as they are. A length of 0 has none.
    """
    item = tl.program_id(0)
    seq, split = _find_split(
        item // HEADS, context_lens, num_seqs, WINDOW, SPLIT, MAX_SPLITS
    )  # fmt: skip
    while seq < num_seqs:
        head = item % HEADS
        length = tl.load(context_lens + seq)
        oldest, size, first_split, _ = _splits(length, WINDOW, SPLIT, MAX_SPLITS)
        start = (first_split + split) * size
        stop = tl.minimum(start + size, length)
        start = tl.maximum(start, oldest // BN * BN)
        qs, _, query_head, live = load_queries(
            q, seq, 1, head, q_row_stride, q_head_stride, GROUP, KD, BM, DP
        )  # fmt: skip
        acc, total, top = attend(
            qs, k_cache + head.to(tl.int64) * k_head_stride,
            v_cache + head.to(tl.int64) * v_head_stride,
            block_tables + seq.to(tl.int64) * table_stride,
            tl.full((BM,), 0, tl.int32) + (length - 1), oldest, start, stop,
            KD, VD, BLOCK, SCALE, WINDOW, SOFTCAP, BM, BN, DP, VP,
        )  # fmt: skip
        place = (seq * MAX_SPLITS + split).to(tl.int64) * (HEADS * GROUP) + query_head
        d = tl.arange(0, VP)
        tl.store(
            parts + place[:, None] * VD + d[None, :], acc / total[:, None],
            mask=live[:, None] & (d < VD)[None, :],
        )  # fmt: skip
        tl.store(weights + place, top + tl.log2(total), mask=live)
        item += tl.num_programs(0)
        seq, split = _find_split(
            item // HEADS, context_lens, num_seqs, WINDOW, SPLIT, MAX_SPLITS
        )  # fmt: skip


@triton.jit
def merge_kernel(
    parts, weights, y, sinks, context_lens,
    VD: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, VP: tl.constexpr,
    SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row and one query head in the order of the context.

    Semantics:
        y [num_seqs, heads, VD] = sum_s 2^weights_s parts_s / (sum_s 2^weights_s + exp(sink));
        zero for a sequence without tokens.
    """
    seq, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    _, _, _, count = _splits(tl.load(context_lens + seq), WINDOW, SPLIT, MAX_SPLITS)
    s = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, VP)
    place = (seq * MAX_SPLITS + s).to(tl.int64) * heads + head
    weight = tl.load(weights + place, mask=s < count, other=NOTHING)
    held = (s < count)[:, None] & (d < VD)[None, :]
    part = tl.load(parts + place[:, None] * VD + d[None, :], mask=held, other=0.0)
    top = tl.max(weight, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    else:
        top = tl.where(count > 0, top, 0.0)
    weight = tl.exp2(weight - top)
    total = tl.sum(weight, 0)
    if SINKS:
        total += tl.exp2(sink - top)
    else:
        total = tl.where(count > 0, total, 1.0)
    out = tl.sum(part * weight[:, None], 0) / total
    at = y + (seq.to(tl.int64) * heads + head) * VD + d
    tl.store(at, out.to(y.dtype.element_ty), mask=d < VD)

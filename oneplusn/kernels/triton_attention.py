"""The Triton kernels of attention over the paged KV cache: what all share, prefill, the write.

A *tile* is up to BM pairs (row of the batch, query head of one KV group), the heads running
fastest: a key that is loaded meets all heads that read it. A tile walks over cached tokens in steps
of BN columns that begin at multiples of BN, so a row meets the same columns in the same steps
whatever else is in its tile, its launch or its batch, and has the same bits.

What a row may not see is not loaded, but for the later rows of its own tile.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(math.log2(math.e))
NOTHING = tl.constexpr(-math.inf)
WIDE = tl.constexpr(128)
"""Sequences that a program looks at at once to find its own."""


@triton.jit
def _tanh(x):
    """Return tanh x; no exponential overflows."""
    small = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    return tl.where(x < 0, small - 1, 1 - small) / (1 + small)


@triton.jit
def load_queries(
    q, first_row, num_rows, head, row_stride, head_stride,
    GROUP: tl.constexpr, KD: tl.constexpr, BM: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Return the queries of a tile `[BM, DP]`, and of each pair: its row, its head, if it is one.

    Columns from KD on, and pairs that are none, are zero.
    """
    m = tl.arange(0, BM)
    d = tl.arange(0, DP)
    row, query_head = first_row + m // GROUP, head * GROUP + m % GROUP
    live = m < num_rows * GROUP
    at = q + row.to(tl.int64) * row_stride + query_head * head_stride
    inside = live[:, None] & (d < KD)[None, :]
    return tl.load(at[:, None] + d[None, :], mask=inside, other=0.0), row, query_head, live


@triton.jit
def attend(
    qs, k_cache, v_cache, table, position, oldest, start, stop,
    KD: tl.constexpr, VD: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """Attend from the rows of a tile to the tokens of one sequence from `start` to `stop` - 1.

    Semantics:
        qs [BM, DP], position int32 [BM]; k_cache, v_cache: rows of one KV head; table: the
        sequence's blocks. Tokens before `oldest` are not loaded. `start` is a multiple of BN.
        Scores count in powers of two.

    Returns:
        Of each row: sum of exp2(s_j - top) v_j `[BM, VP]`, the sum without v, and top, the largest
        score; -inf where the row sees none of the tokens.
    """
    top = tl.full((BM,), NOTHING, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, VP), tl.float32)
    d = tl.arange(0, DP)
    v_d = tl.arange(0, VP)
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16.
        qs = qs.to(tl.float32)
    for first in range(start, stop, BN):
        j = first + tl.arange(0, BN)
        held = (j >= oldest) & (j < stop)
        block = tl.load(table + j // BLOCK, mask=held, other=0)
        place = block.to(tl.int64) * BLOCK + j % BLOCK
        at = k_cache + place[None, :] * KD + d[:, None]
        ks = tl.load(at, mask=held[None, :] & (d < KD)[:, None], other=0.0)
        if INTERPRETED:
            ks = ks.to(tl.float32)
        scores = tl.dot(qs, ks, input_precision="ieee")
        if SOFTCAP is not None:
            scores = _tanh(scores * (SCALE / SOFTCAP)) * (SOFTCAP * LOG2E)
        else:
            scores *= SCALE * LOG2E
        seen = held[None, :] & (j[None, :] <= position[:, None])
        if WINDOW is not None:
            seen &= j[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, NOTHING)
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet: no difference of two infinities.
        base = tl.where(higher == NOTHING, 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(weights, 1)
        at = v_cache + place[:, None] * VD + v_d[None, :]
        vs = tl.load(at, mask=held[:, None] & (v_d < VD)[None, :], other=0.0)
        weights = weights.to(vs.dtype)
        if INTERPRETED:
            weights = weights.to(tl.float32)
            vs = vs.to(tl.float32)
        acc = tl.dot(weights, vs, acc * kept[:, None], input_precision="ieee")
        top = higher
    return acc, total, top


@triton.jit
def _find_rows(tile, query_start, num_decodes, num_seqs, ROWS: tl.constexpr):
    """Return the sequence of a tile of up to ROWS rows, and the first of its rows in the sequence.

    Sequence s begins at tile (rows before it) // ROWS + (sequences before it): room for all of its
    tiles, and the sum for all sequences is known without looking at any.
    """
    first_row = tl.load(query_start + num_decodes)
    seq, begin = num_decodes - 1, 0
    for first in range(num_decodes, num_seqs, WIDE):
        i = first + tl.arange(0, WIDE)
        rows = tl.load(query_start + i, mask=i < num_seqs, other=0) - first_row
        begins = rows // ROWS + (i - num_decodes)
        passed = (i < num_seqs) & (begins <= tile)
        seq += tl.sum(passed.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(passed, begins, 0), 0))
    return seq, (tile - begin) * ROWS


@triton.jit(do_not_specialize=["num_decodes", "num_seqs", "table_stride"])
def prefill_kernel(
    q, k_cache, v_cache, y, sinks, block_tables, query_start, context_lens,
    num_decodes, num_seqs, table_stride, q_row_stride, q_head_stride, k_head_stride, v_head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KD: tl.constexpr, VD: tl.constexpr,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """Attend from consecutive rows of the sequences from `num_decodes` on; a tile per program.

    Semantics:
        query_start int32 [num_seqs + 1], context_lens int32 [num_seqs]: as in `AttentionMeta`; the
        last row of a sequence stands at its length - 1. A sequence may have no rows.
        y [T, HEADS * GROUP, VD]: the rows of these sequences.
    """
    head = tl.program_id(1)
    ROWS: tl.constexpr = BM // GROUP
    seq, done = _find_rows(tl.program_id(0), query_start, num_decodes, num_seqs, ROWS)
    first_row = tl.load(query_start + seq)
    num_rows = tl.load(query_start + seq + 1) - first_row
    if done < num_rows:
        position = tl.load(context_lens + seq) - num_rows + done
        rows = tl.minimum(num_rows - done, ROWS)
        qs, row, query_head, live = load_queries(
            q, first_row + done, rows, head, q_row_stride, q_head_stride, GROUP, KD, BM, DP
        )  # fmt: skip
        oldest = position * 0
        if WINDOW is not None:
            oldest = tl.maximum(position - (WINDOW - 1), 0)
        acc, total, top = attend(
            qs, k_cache + head.to(tl.int64) * k_head_stride,
            v_cache + head.to(tl.int64) * v_head_stride,
            block_tables + seq.to(tl.int64) * table_stride,
            position + tl.minimum(tl.arange(0, BM) // GROUP, rows - 1),
            oldest, oldest // BN * BN, position + rows,
            KD, VD, BLOCK, SCALE, WINDOW, SOFTCAP, BM, BN, DP, VP,
        )  # fmt: skip
        if SINKS:
            sink = tl.load(sinks + query_head, mask=live, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(top, sink)
            kept = tl.exp2(top - higher)
            acc *= kept[:, None]
            total = total * kept + tl.exp2(sink - higher)
        d = tl.arange(0, VP)
        at = y + (row.to(tl.int64) * (HEADS * GROUP) + query_head)[:, None] * VD + d[None, :]
        out = acc / total[:, None]
        tl.store(at, out.to(y.dtype.element_ty), mask=live[:, None] & (d < VD)[None, :])


@triton.jit
def _finite(x, LARGEST: tl.constexpr):
    """Return x with 0 for NaN and the largest number for infinity."""
    wide = x.to(tl.float32)
    wide = tl.where(wide == wide, wide, 0.0)
    return tl.minimum(tl.maximum(wide, -LARGEST), LARGEST).to(x.dtype)


@triton.jit
def write_kernel(
    k, v, k_cache, v_cache, kv_pos,
    k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    k_cache_stride, v_cache_stride,
    HEADS: tl.constexpr, KD: tl.constexpr, VD: tl.constexpr, LARGEST: tl.constexpr,
    HP: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """Put the key and the value of one row into the cache; a negative place is none."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(kv_pos + row)
    h = tl.arange(0, HP)
    held = (h < HEADS) & (place >= 0)
    d = tl.arange(0, DP)
    mask = held[:, None] & (d < KD)[None, :]
    source = k + row * k_row_stride + h[:, None] * k_head_stride + d[None, :]
    target = k_cache + h.to(tl.int64)[:, None] * k_cache_stride + place * KD + d[None, :]
    tl.store(target, _finite(tl.load(source, mask=mask, other=0.0), LARGEST), mask=mask)
    d = tl.arange(0, VP)
    mask = held[:, None] & (d < VD)[None, :]
    source = v + row * v_row_stride + h[:, None] * v_head_stride + d[None, :]
    target = v_cache + h.to(tl.int64)[:, None] * v_cache_stride + place * VD + d[None, :]
    tl.store(target, _finite(tl.load(source, mask=mask, other=0.0), LARGEST), mask=mask)

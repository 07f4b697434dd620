"""The Triton kernels of the delta: shrink and expand in one launch, and in two.

A launch is a list of items. A *shrink* item reads one chunk (up to 64 rank rows of A) for one
tile, one slice and one part of K; an *expand* item reads the tile's pages of B for one block of
columns. Programs draw tickets; shrink items have the lower numbers, so a program that waits for
one waits for a program that already has it and itself never waits. That holds for any number of
programs, resident or not.

What a shrink item leaves is summed in a fixed order, so equal rows give equal bits, whatever
else is in the batch and however many programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from oneplusn.kernels import device_plan, plan

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PAGE = tl.constexpr(plan.PAGE)
MAX_RUNS = tl.constexpr(plan.MAX_RUNS)
CHUNK = tl.constexpr(device_plan.DevicePlan.CHUNK)
PLACES = tl.constexpr(device_plan.PLACES)
CHUNK_FIELDS = tl.constexpr(device_plan.CHUNK_FIELDS)
TILE_FIELDS = tl.constexpr(device_plan.TILE_FIELDS)
PLACE_FIELDS = tl.constexpr(device_plan.PLACE_FIELDS)


@triton.jit
def _dot(a, b, acc):
    """Return acc + a @ b; fp32 is not rounded to tf32."""
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _rows_of(first_row, num_rows, rows, BM: tl.constexpr):
    """Return the batch rows of a tile, and which of the BM there are."""
    m = tl.arange(0, BM)
    live = m < num_rows
    return tl.load(rows + first_row + m, mask=live, other=0), live


@triton.jit
def _gates(
    first_row, first_k, num_runs, number, rank_row, live, lane_live,
    slots, ks, gate_first, gates, BM: tl.constexpr,
):  # fmt: skip
    """Return the gates of a chunk `[BM, 64]`, and where a row uses the run at all."""
    m = tl.arange(0, BM)
    slot = tl.load(slots + first_row + m, mask=live, other=0)
    inside = live[:, None] & lane_live[None, :]
    k = tl.load(ks + first_k + m[:, None] * num_runs + number[None, :], mask=inside, other=-1)
    used = k >= 0
    first = tl.load(gate_first + slot[:, None] * MAX_RUNS + k, mask=used, other=0)
    return tl.load(gates + first + rank_row[None, :], mask=used, other=0.0), used


# A function of its own: inlined, what it shares with the expand is computed ahead of the loop over
# tickets and held in registers, 168 instead of 128 of them.
@triton.jit(noinline=True)
def _shrink(
    item, x, a, h, planes, arrivals, flags,
    rows, slots, chunks, places, ks, run_first, run_rows, gate_first, gates,
    K, x_stride, max_chunks,
    S: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """Do one shrink item: (chunk, slice, part of K), the last running fastest.

    The last of a chunk's parts to arrive sums them in order, applies the gates, once, and with
    RAISE counts the flag of (tile, slice) up.
    """
    split = item % SPLITS
    s = item // SPLITS % S
    chunk = item // (SPLITS * S)
    record = chunks + chunk * CHUNK_FIELDS
    first_row = tl.load(record + 1)
    row, live = _rows_of(first_row, tl.load(record + 2), rows, BM)

    lane = tl.arange(0, CHUNK)
    lane_live = lane // PAGE < tl.load(record + 4)
    place = places + (tl.load(record + 3) + lane // PAGE) * PLACE_FIELDS
    run = tl.load(place, mask=lane_live, other=0)
    rank_row = tl.load(place + 1, mask=lane_live, other=0) * PAGE + lane % PAGE
    number = tl.load(place + 2, mask=lane_live, other=0)
    lane_live &= rank_row < tl.load(run_rows + run)
    page = tl.load(run_first + run) + rank_row // PAGE

    a_rows = a + ((page.to(tl.int64) * S + s) * PAGE + lane % PAGE) * K
    x_rows = x + row.to(tl.int64) * x_stride
    acc = tl.zeros((BM, CHUNK), tl.float32)
    for start in range(0, tl.minimum(SPLIT_K, K - split * SPLIT_K), BK):
        k = split * SPLIT_K + start + tl.arange(0, BK)
        if EVEN_K:
            xs = tl.load(x_rows[:, None] + k[None, :], mask=live[:, None], other=0.0)
            ws = tl.load(a_rows[None, :] + k[:, None], mask=lane_live[None, :], other=0.0)
        else:
            inside = k < K
            xs = tl.load(
                x_rows[:, None] + k[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            ws = tl.load(
                a_rows[None, :] + k[:, None], mask=lane_live[None, :] & inside[:, None], other=0.0
            )
        acc = _dot(xs, ws, acc)

    block = ((s * max_chunks + chunk) * BM + tl.arange(0, BM))[:, None] * CHUNK + lane[None, :]
    if SPLITS > 1:
        plane = S * max_chunks * BM * CHUNK
        tl.store(planes + split * plane + block, acc)
    # Loaded by all parts, for the last one would wait for them, one after the other, at the end.
    gate, used = _gates(
        first_row, tl.load(record + 5), tl.load(record + 6), number, rank_row, live, lane_live,
        slots, ks, gate_first, gates, BM,
    )  # fmt: skip
    last = True
    if SPLITS > 1:
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + chunk * S + s, 1, sem="acq_rel", scope="gpu")
        last = arrived == SPLITS - 1
    if last:
        if SPLITS > 1:
            acc = tl.zeros((BM, CHUNK), tl.float32)
            for part in tl.static_range(SPLITS):
                acc += tl.load(planes + part * plane + block, cache_modifier=".cg")
            tl.store(arrivals + chunk * S + s, 0)
        # Not a product alone: where a row does not use a run, A x may be anything.
        tl.store(h + block, tl.where(used, acc * gate, 0.0).to(h.dtype.element_ty))
        if RAISE:
            tl.debug_barrier()
            tl.atomic_add(flags + tl.load(record) * S + s, 1, sem="release", scope="gpu")


@triton.jit
def _page_of_b(place, last_place, tables, N, column, live):
    """Return one page of B `[16, BN]`; rank rows beyond the end of the run are zero."""
    places, run_first, run_rows, b = tables
    inside = place < last_place
    run = tl.load(places + place * PLACE_FIELDS, mask=inside, other=0)
    index = tl.load(places + place * PLACE_FIELDS + 1, mask=inside, other=0)
    left = tl.load(run_rows + run, mask=inside, other=0) - index * PAGE
    page = (tl.load(run_first + run) + index).to(tl.int64)
    r = tl.arange(0, PAGE)
    at = b + (page * PAGE + r)[:, None] * N + column[None, :]
    return tl.load(at, mask=(r < left)[:, None] & live[None, :], other=0.0)


@triton.jit
def _add_page(acc, bs, h_rows, part: tl.constexpr):
    """Return acc + H B for page `part` of a chunk; `h_rows` point to its rows of H."""
    at = h_rows[:, None] + (tl.arange(0, PAGE) + part * PAGE)[None, :]
    return _dot(tl.load(at, cache_modifier=".cg"), bs, acc)


@triton.jit
def _num_blocks(N0, N1, N2, S: tl.constexpr, BN: tl.constexpr):
    """Return the blocks of columns of all slices; none lies across two."""
    blocks = tl.cdiv(N0, BN)
    if S > 1:
        blocks += tl.cdiv(N1, BN)
    if S > 2:
        blocks += tl.cdiv(N2, BN)
    return blocks


@triton.jit
def _columns(block, N0, N1, N2, S: tl.constexpr, BN: tl.constexpr):
    """Return the slice of a block, its columns there, and where among all N the slice begins."""
    s, first_block, start = 0, 0, 0
    if S > 1:
        if block >= tl.cdiv(N0, BN):
            s, first_block, start = 1, tl.cdiv(N0, BN), N0
    if S > 2:
        if block >= tl.cdiv(N0, BN) + tl.cdiv(N1, BN):
            s, first_block, start = 2, tl.cdiv(N0, BN) + tl.cdiv(N1, BN), N0 + N1
    return s, (block - first_block) * BN + tl.arange(0, BN), start


@triton.jit
def _one_of(s, of0, of1, of2, S: tl.constexpr):
    """Return what belongs to slice s."""
    chosen = of0
    if S > 1:
        if s == 1:
            chosen = of1
    if S > 2:
        if s == 2:
            chosen = of2
    return chosen


@triton.jit
def _expand(
    item, b, y0, y1, y2, h, flags, rows, tiles, places, run_first, run_rows,
    N0, N1, N2, y0_stride, y1_stride, y2_stride, max_chunks,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ADD: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Do one expand item: (tile, block of columns within a slice), the latter running faster.

    What does not come from the shrink is loaded before the wait: y, and the first chunk of B.
    """
    blocks = _num_blocks(N0, N1, N2, S, BN)
    tile = item // blocks
    s, n, start = _columns(item % blocks, N0, N1, N2, S, BN)
    y = _one_of(s, y0, y1, y2, S)
    n_live = n < _one_of(s, N0, N1, N2, S)
    column = start + n
    total = N0
    if S > 1:
        total += N1
    if S > 2:
        total += N2
    record = tiles + tile * TILE_FIELDS
    row, live = _rows_of(tl.load(record), tl.load(record + 1), rows, BM)
    first_place = tl.load(record + 2)
    last_place = first_place + tl.load(record + 3)
    first_chunk = tl.load(record + 4)
    num_chunks = tl.load(record + 5)

    tables = (places, run_first, run_rows, b)
    b0 = _page_of_b(first_place, last_place, tables, total, column, n_live)
    b1 = _page_of_b(first_place + 1, last_place, tables, total, column, n_live)
    b2 = _page_of_b(first_place + 2, last_place, tables, total, column, n_live)
    b3 = _page_of_b(first_place + 3, last_place, tables, total, column, n_live)
    y_stride = _one_of(s, y0_stride, y1_stride, y2_stride, S)
    out = y + row.to(tl.int64)[:, None] * y_stride + n[None, :]
    mask = live[:, None] & n_live[None, :]
    if ADD:
        acc = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    if PDL:
        # The shrink began when all before it had ended, so y was there already.
        gdc_wait()
    if WAIT:
        while tl.atomic_add(flags + tile * S + s, 0, sem="acquire", scope="gpu") < num_chunks:
            pass
        tl.debug_barrier()
    if num_chunks > 0:
        h_rows = h + ((s * max_chunks + first_chunk) * BM + tl.arange(0, BM)) * CHUNK
        acc = _add_page(acc, b0, h_rows, 0)
        acc = _add_page(acc, b1, h_rows, 1)
        acc = _add_page(acc, b2, h_rows, 2)
        acc = _add_page(acc, b3, h_rows, 3)
        for chunk in range(1, num_chunks):
            h_rows += BM * CHUNK
            for part in tl.static_range(PLACES):
                place = first_place + chunk * PLACES + part
                bs = _page_of_b(place, last_place, tables, total, column, n_live)
                acc = _add_page(acc, bs, h_rows, part)
    tl.store(out, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def delta_kernel(
    x, a, b, y0, y1, y2, h, planes, control,
    counts, rows, slots, tiles, chunks, places, ks, run_first, run_rows, gate_first, gates,
    K, N0, N1, N2, x_stride, y0_stride, y1_stride, y2_stride, max_tiles, max_chunks,
    S: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Do all items of a site, in one launch of any number of programs.

    Control words: ticket, programs that are out, a flag per (tile, slice) that counts its chunks,
    the parts that have arrived per (chunk, slice). The last program out sets them to zero again.
    """
    flags = control + 2
    arrivals = flags + max_tiles * S
    # Without ADD, rows without adapter are written too: zeros.
    num_tiles = tl.load(counts) if ADD else tl.load(counts + 1)
    num_shrinks = tl.load(counts + 2) * (S * SPLITS)
    num_items = num_shrinks + num_tiles * _num_blocks(N0, N1, N2, S, BN)
    ticket = tl.atomic_add(control, 1, sem="relaxed", scope="gpu")
    while ticket < num_items:
        # Drawn ahead, for it takes as long as a load; whoever holds a shrink item gets to it.
        ahead = tl.atomic_add(control, 1, sem="relaxed", scope="gpu")
        if ticket < num_shrinks:
            _shrink(
                ticket, x, a, h, planes, arrivals, flags,
                rows, slots, chunks, places, ks, run_first, run_rows, gate_first, gates,
                K, x_stride, max_chunks, S, SPLITS, SPLIT_K, EVEN_K, BM, BK, True,
            )  # fmt: skip
        else:
            _expand(
                ticket - num_shrinks, b, y0, y1, y2, h, flags,
                rows, tiles, places, run_first, run_rows,
                N0, N1, N2, y0_stride, y1_stride, y2_stride, max_chunks,
                S, BM, BN, ADD, True, False,
            )  # fmt: skip
        ticket = ahead
    out = tl.atomic_add(control + 1, 1, sem="acq_rel", scope="gpu")
    if out == tl.num_programs(0) - 1:
        for start in range(0, num_tiles * S, 128):
            at = start + tl.arange(0, 128)
            tl.store(flags + at, tl.zeros((128,), tl.int32), mask=at < num_tiles * S)
        tl.store(control, 0)
        tl.store(control + 1, 0)


@triton.jit
def shrink_kernel(
    x, a, h, planes, control,
    counts, rows, slots, tiles, chunks, places, ks, run_first, run_rows, gate_first, gates,
    K, x_stride, max_tiles, max_chunks,
    S: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Do the shrink items of a site, one per program; the first launch of two."""
    if PDL:
        # Whatever ran before must have ended: x comes from there, and the control words.
        gdc_wait()
        gdc_launch_dependents()
    flags = control + 2
    arrivals = flags + max_tiles * S
    item = tl.program_id(0)
    if item < tl.load(counts + 2) * (S * SPLITS):
        _shrink(
            item, x, a, h, planes, arrivals, flags,
            rows, slots, chunks, places, ks, run_first, run_rows, gate_first, gates,
            K, x_stride, max_chunks, S, SPLITS, SPLIT_K, EVEN_K, BM, BK, False,
        )  # fmt: skip


@triton.jit
def expand_kernel(
    b, y0, y1, y2, h,
    counts, rows, tiles, places, run_first, run_rows,
    N0, N1, N2, y0_stride, y1_stride, y2_stride, max_chunks,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Do the expand items of a site, one per program; the second launch of two."""
    if PDL:
        gdc_launch_dependents()
    item = tl.program_id(0)
    num_tiles = tl.load(counts) if ADD else tl.load(counts + 1)
    if item < num_tiles * _num_blocks(N0, N1, N2, S, BN):
        _expand(
            item, b, y0, y1, y2, h, counts, rows, tiles, places, run_first, run_rows,
            N0, N1, N2, y0_stride, y1_stride, y2_stride, max_chunks, S, BM, BN, ADD, False, PDL,
        )  # fmt: skip

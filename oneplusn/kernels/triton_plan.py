"""The plan made on the device, for steps whose rows' slots the host does not know yet.

Three launches fill a `DevicePlan` from the slots of the rows, without a count that comes back to
the host: sort the rows and cut tiles, unite the runs of every tile, lay the tiles' entries one
behind the other. A launch boundary is the only thing that orders them; there are no atomics, so
the same rows always give the same plan: that of `pack(build_plan(...))`, entry for entry.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from oneplusn.kernels.device_plan import (
    ALIGN,
    CHUNK_FIELDS,
    PLACE_FIELDS,
    PLACES,
    TILE_FIELDS,
    DevicePlan,
)
from oneplusn.kernels.plan import ABSENT, BASE_SLOT, MAX_RUNS, RunKey, SlotInfo, sort_slots

MAX_ROWS = 1024
"""Rows that one program sorts."""
MAX_TILE_ROWS = 128
LAST = 2**20 - 1
"""Order of what is not resident. A sort key, order * 2**11 + index, stays below 2**31."""
# Numbers that the first launch leaves for the other two: adapted tiles, tiles, adapted rows.
HEADER = 4

_ABSENT, _BASE_SLOT, _LAST = tl.constexpr(ABSENT), tl.constexpr(BASE_SLOT), tl.constexpr(LAST)
_HEADER, _MAX_RUNS, _PLACES = tl.constexpr(HEADER), tl.constexpr(MAX_RUNS), tl.constexpr(PLACES)
_TILE, _CHUNK = tl.constexpr(TILE_FIELDS), tl.constexpr(CHUNK_FIELDS)
_PLACE = tl.constexpr(PLACE_FIELDS)


class SlotTables:
    """What a plan needs to know of the resident slots and runs, in the memory of a device.

    Attributes:
        buffer: The tables one behind the other, so that one copy moves all of them.
        slot_order: `[slots]`, rank of a slot by `sort_slots`; LAST when not resident.
        slot_cluster: `[slots]`, number of its cluster in the sort of the clusters.
        slot_runs: `[slots, MAX_RUNS]`, run ids in the order of k, ABSENT beyond.
        run_order: `[runs]`, rank of a run by its key; LAST when not resident.
        run_pages: `[runs]`, its pages at the site where it has the most.
    """

    def __init__(self, slots: int, runs: int, device: torch.device | str = "cpu") -> None:
        """Allocate the tables of as many slots and runs, none of them resident."""
        assert max(slots, runs) <= LAST, (slots, runs)
        self._sizes = [_aligned(size) for size in (slots, slots, slots * MAX_RUNS, runs, runs)]
        self.num_slots = slots
        self.buffer = torch.empty(sum(self._sizes), dtype=torch.int32, device=device)
        sections = self.buffer.split(self._sizes)
        self.slot_order, self.slot_cluster, slot_runs, self.run_order, self.run_pages = sections
        self.slot_runs = slot_runs.view(-1, MAX_RUNS)
        self.write({})

    def write(self, slots: Mapping[int, SlotInfo]) -> None:
        """Replace all tables, in one copy on the current stream that nobody waits for.

        Every call takes host memory of its own, since the copy of the call before may be under way.
        """
        host = torch.empty(self.buffer.shape, dtype=torch.int32, pin_memory=self.buffer.is_cuda)
        sections = [section.numpy() for section in host.split(self._sizes)]
        for section, fill in zip(sections, (LAST, ABSENT, ABSENT, LAST, 0), strict=True):
            section.fill(fill)
        slot_order, slot_cluster, slot_runs, run_order, run_pages = sections
        order = sort_slots(slots, slots)
        clusters = {info.cluster for info in slots.values()}
        numbers = {cluster: number for number, cluster in enumerate(sorted(clusters))}
        run_keys: dict[int, RunKey] = {}
        for rank, slot in enumerate(order):
            info = slots[slot]
            slot_order[slot], slot_cluster[slot] = rank, numbers[info.cluster]
            slot_runs[slot * MAX_RUNS :][: len(info.runs)] = info.runs
            run_pages[list(info.runs)] = info.run_pages
            run_keys.update(zip(info.runs, info.run_keys, strict=True))
        run_order[sorted(run_keys, key=run_keys.__getitem__)] = np.arange(len(run_keys))
        self.buffer.copy_(host, non_blocking=True)


def scratch_size(num_rows: int) -> int:
    """Return the int32 entries of scratch that a plan of `num_rows` rows takes."""
    return HEADER + num_rows * MAX_RUNS


def build_device_plan(
    row_slots: Tensor, tables: SlotTables, out: DevicePlan, scratch: Tensor
) -> None:
    """Group the rows of a step on the device: three launches on the current stream, no sync.

    Semantics:
        out = pack(build_plan(row_slots, slots, tile_rows=out.tile_rows), out.capacity)
        where `slots` is what was last written to `tables`; row_slots int32 [T], T <= 1,024.
        Entries that `out.counts` does not name are undefined. A row of no resident slot is bare.
        A plan that takes more than `out.capacity` becomes one without tiles: its counts are 0, as
        are those of no other plan of T > 0 rows, and nothing is written beyond the capacity. The
        host prevents it before the launch, by `out.capacity.holds(Capacity.of(plan))`.

    Args:
        row_slots: The slot of each row.
        tables: What the slots stand for.
        out: Receives the plan. Its tiles hold a power of two of rows, 128 at most.
        scratch: int32, `scratch_size(T)` entries at least, undefined before and after.
    """
    num_rows, capacity = len(row_slots), out.capacity
    assert num_rows <= min(MAX_ROWS, capacity.rows), (num_rows, capacity)
    assert out.tile_rows in (16, 32, 64, MAX_TILE_ROWS), out.tile_rows
    assert len(scratch) >= scratch_size(num_rows), (len(scratch), num_rows)
    log_rows = max(4, (num_rows - 1).bit_length())
    sort_kernel[(1,)](
        row_slots,
        tables.slot_order,
        tables.slot_cluster,
        out.rows,
        out.slots,
        out.tiles,
        scratch,
        num_rows,
        tables.num_slots,
        capacity.tiles,
        TILE_ROWS=out.tile_rows,
        LOG=log_rows,
        num_warps=8 if log_rows > 8 else 4,
    )
    programs = max(1, min(num_rows, capacity.tiles))
    log = (out.tile_rows * MAX_RUNS - 1).bit_length()
    meta = {"LOG": log, "num_warps": 8 if log > 10 else 4}
    run_tables = tables.slot_runs, tables.run_order, tables.run_pages
    union_kernel[(programs,)](
        *run_tables, out.slots, out.tiles, scratch, num_rows, capacity.tiles, **meta
    )
    layout_kernel[(programs,)](
        tables.slot_runs,
        tables.run_pages,
        out.slots,
        out.counts,
        out.tiles,
        out.chunks,
        out.places,
        out.ks,
        scratch,
        *capacity[1:],
        TILES=max(64, triton.next_power_of_2(programs)),
        **meta,
    )


@triton.jit(do_not_specialize=["T", "num_slots", "max_tiles"])
def sort_kernel(
    row_slots,
    slot_order,
    slot_cluster,
    rows,
    slots,
    tiles,
    scratch,
    T,
    num_slots,
    max_tiles,
    TILE_ROWS: tl.constexpr,
    LOG: tl.constexpr,
):
    """Sort the rows and cut them into tiles; one program.

    Semantics:
        rows [T], slots [T], tiles[:, 0]: final; T <= 2**LOG.
        scratch[:3] = adapted tiles, all tiles, adapted rows; more tiles than max_tiles are counted
        but not written.
    """
    i = tl.arange(0, 1 << LOG)
    inside = i < T
    slot = tl.load(row_slots + i, mask=inside, other=_ABSENT)
    known = (slot >= 0) & (slot < num_slots)
    order = tl.load(slot_order + slot, mask=known, other=_LAST)
    # Positions beyond T have the order of bare rows and higher numbers: they end up beyond T.
    key = _sort((order << LOG) | i, i, LOG)
    row = key & ((1 << LOG) - 1)
    adapted = (key >> LOG) < _LAST
    slot = tl.load(row_slots + row, mask=adapted, other=_BASE_SLOT)
    tl.store(rows + i, row, mask=inside)
    tl.store(slots + i, slot, mask=inside)

    cluster = tl.load(slot_cluster + slot, mask=adapted, other=_ABSENT)
    begins = (i == 0) | (cluster != _previous(cluster, i))
    cluster_start = tl.associative_scan(tl.where(begins, i, 0), 0, _larger)
    cut = inside & ((i - cluster_start) % TILE_ROWS == 0)
    tile = tl.cumsum(cut.to(tl.int32), 0) - 1
    tl.store(tiles + tile * _TILE, i, mask=cut & (tile < max_tiles))
    tl.store(scratch, tl.sum((cut & adapted).to(tl.int32), 0))
    tl.store(scratch + 1, tl.sum(cut.to(tl.int32), 0))
    tl.store(scratch + 2, tl.sum(adapted.to(tl.int32), 0))


@triton.jit(do_not_specialize=["T", "max_tiles"])
def union_kernel(
    slot_runs,
    run_order,
    run_pages,
    slots,
    tiles,
    scratch,
    T,
    max_tiles,
    LOG: tl.constexpr,
):
    """Unite the runs of a tile's rows; one program per tile.

    Semantics:
        A candidate is a pair (row of the tile, k), numbered row * MAX_RUNS + k; 2**LOG of them.
        tiles[:, (1, 3, 5, 7)]: final.
        scratch[HEADER:] [T, MAX_RUNS]: per tile its candidates' sort keys, by the order of runs.
    """
    tile = tl.program_id(0)
    num_tiles = tl.load(scratch + 1)
    if (tile < num_tiles) & (num_tiles <= max_tiles):
        fields = tiles + tile * _TILE
        first = tl.load(fields)
        stop = tl.load(fields + _TILE, mask=tile + 1 < num_tiles, other=T)
        i = tl.arange(0, 1 << LOG)
        inside = i < (stop - first) * _MAX_RUNS
        slot = tl.load(slots + first + i // _MAX_RUNS, mask=inside, other=_BASE_SLOT)
        run = tl.load(slot_runs + slot * _MAX_RUNS + i % _MAX_RUNS, mask=inside, other=_ABSENT)
        order = tl.load(run_order + run, mask=run != _ABSENT, other=_LAST)
        key = _sort((order << LOG) | i, i, LOG)
        tl.store(scratch + _HEADER + first * _MAX_RUNS + i, key, mask=inside)

        _, _, _, new, pages = _candidates(key, i, first, slots, slot_runs, run_pages, LOG)
        places = tl.sum(pages, 0)
        tl.store(fields + 1, stop - first)
        tl.store(fields + 3, places)
        tl.store(fields + 5, tl.cdiv(places, _PLACES))
        tl.store(fields + 7, tl.sum(new.to(tl.int32), 0))


@triton.jit(do_not_specialize=["max_tiles", "max_chunks", "max_places", "max_ks"])
def layout_kernel(
    slot_runs,
    run_pages,
    slots,
    counts,
    tiles,
    chunks,
    places,
    ks,
    scratch,
    max_tiles,
    max_chunks,
    max_places,
    max_ks,
    TILES: tl.constexpr,
    LOG: tl.constexpr,
):
    """Write what a tile has of chunks, places and ks behind that of the tiles before it.

    Semantics:
        One program per tile, TILES of them at most.
        tiles[:, (2, 4, 6)], chunks, places, ks: final, or untouched when over a capacity.
        counts [4]: final, or zero when over a capacity.
    """
    tile = tl.program_id(0)
    num_tiles = tl.load(scratch + 1)
    j = tl.arange(0, TILES)
    # With more tiles than there is room for, the launch before this one wrote none of them.
    counted = (j < num_tiles) & (num_tiles <= max_tiles)
    sizes = tl.load(tiles + j * _TILE + 3, mask=counted, other=0)
    first_place, num_places = tl.sum(tl.where(j < tile, sizes, 0), 0), tl.sum(sizes, 0)
    sizes = tl.load(tiles + j * _TILE + 5, mask=counted, other=0)
    first_chunk, num_chunks = tl.sum(tl.where(j < tile, sizes, 0), 0), tl.sum(sizes, 0)
    sizes = tl.load(tiles + j * _TILE + 1, mask=counted, other=0)
    sizes *= tl.load(tiles + j * _TILE + 7, mask=counted, other=0)
    first_k, num_ks = tl.sum(tl.where(j < tile, sizes, 0), 0), tl.sum(sizes, 0)
    fits = (num_tiles <= max_tiles) & (num_chunks <= max_chunks)
    fits = fits & (num_places <= max_places) & (num_ks <= max_ks)
    if tile == 0:
        tl.store(counts, tl.where(fits, tl.load(scratch), 0))
        tl.store(counts + 1, tl.where(fits, num_tiles, 0))
        tl.store(counts + 2, tl.where(fits, num_chunks, 0))
        tl.store(counts + 3, tl.where(fits, tl.load(scratch + 2), 0))
    if fits & (tile < num_tiles):
        fields = tiles + tile * _TILE
        tl.store(fields + 2, first_place)
        tl.store(fields + 4, first_chunk)
        tl.store(fields + 6, first_k)
        i = tl.arange(0, 1 << LOG)
        _store_chunks(chunks + first_chunk * _CHUNK, tile, fields, first_place, first_k, i, LOG)
        places += first_place * _PLACE
        candidates = scratch + _HEADER
        _store_runs(places, ks + first_k, candidates, fields, slots, slot_runs, run_pages, i, LOG)


@triton.jit
def _store_chunks(chunks, tile, fields, first_place, first_k, i, LOG: tl.constexpr):
    """Store a tile's chunks."""
    first = tl.load(fields)
    num_rows = tl.load(fields + 1)
    num_places = tl.load(fields + 3)
    num_runs = tl.load(fields + 7)
    done = 0
    while done < num_places:
        rest = num_places - done - i * _PLACES
        held = rest > 0
        chunk = chunks + (done // _PLACES + i) * _CHUNK
        tl.store(chunk, tile, mask=held)
        tl.store(chunk + 1, first, mask=held)
        tl.store(chunk + 2, num_rows, mask=held)
        tl.store(chunk + 3, first_place + done + i * _PLACES, mask=held)
        tl.store(chunk + 4, tl.minimum(rest, _PLACES), mask=held)
        tl.store(chunk + 5, first_k, mask=held)
        tl.store(chunk + 6, num_runs, mask=held)
        tl.store(chunk + 7, 0, mask=held)
        done += _PLACES << LOG


@triton.jit
def _store_runs(places, ks, candidates, fields, slots, slot_runs, run_pages, i, LOG: tl.constexpr):
    """Store a tile's places, one page of all runs after the other, and its matrix of k."""
    first = tl.load(fields)
    num_rows = tl.load(fields + 1)
    num_runs = tl.load(fields + 7)
    done = 0
    while done < num_rows * num_runs:
        tl.store(ks + done + i, _ABSENT, mask=done + i < num_rows * num_runs)
        done += 1 << LOG
    inside = i < num_rows * _MAX_RUNS
    key = tl.load(candidates + first * _MAX_RUNS + i, mask=inside, other=_LAST << LOG)
    row, k, run, new, pages = _candidates(key, i, first, slots, slot_runs, run_pages, LOG)
    column = tl.cumsum(new.to(tl.int32), 0) - 1
    place = places + (tl.cumsum(pages, 0) - pages) * _PLACE
    page = 0
    most = tl.max(pages, 0)
    while page < most:
        held = page < pages
        tl.store(place, run, mask=held)
        tl.store(place + 1, page, mask=held)
        tl.store(place + 2, column, mask=held)
        tl.store(place + 3, 0, mask=held)
        place += _PLACE
        page += 1
    # Other threads of this program wrote ABSENT where a k belongs.
    tl.debug_barrier()
    tl.store(ks + row * num_runs + column, k, mask=run != _ABSENT)


@triton.jit
def _candidates(key, i, first, slots, slot_runs, run_pages, LOG: tl.constexpr):
    """Read a tile's candidates from their sorted keys.

    Returns:
        Row of the tile and k; the run, or ABSENT; whether it is the first candidate of its run;
        and for those the run's pages, else 0.
    """
    order = key >> LOG
    present = order < _LAST
    candidate = key & ((1 << LOG) - 1)
    row, k = candidate // _MAX_RUNS, candidate % _MAX_RUNS
    slot = tl.load(slots + first + row, mask=present, other=_BASE_SLOT)
    run = tl.load(slot_runs + slot * _MAX_RUNS + k, mask=present, other=_ABSENT)
    new = present & ((i == 0) | (order != _previous(order, i)))
    pages = tl.load(run_pages + run, mask=new, other=0)
    return row, k, run, new, pages


@triton.jit
def _sort(keys, i, LOG: tl.constexpr):
    """Sort 2**LOG keys, ascending, in a bitonic network; `i` is 0 .. 2**LOG - 1.

    tl.sort finds neighbours in a reduction with xor, which the interpreter does one by one in
    Python: seconds per tile.
    """
    for stage in tl.static_range(1, LOG + 1):
        for step in tl.static_range(stage):
            bit = stage - 1 - step
            neighbour = tl.gather(keys, i ^ (1 << bit), 0)
            keep_larger = (((i >> bit) ^ (i >> stage)) & 1) == 1
            keys = tl.where((keys > neighbour) != keep_larger, neighbour, keys)
    return keys


@triton.jit
def _previous(values, i):
    """Return the value at the position before; the first one at position 0."""
    return tl.gather(values, tl.maximum(i - 1, 0), 0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN

"""A plan in the memory of a device, flattened to what a kernel can look up in one step.

A *place* is one page of one run in a tile: the tile's runs in their order, each with as many
places as it has pages at the site where it has the most, so that one plan serves all sites. A
site where a run has fewer pages finds the surplus places empty. A *chunk* is up to four
consecutive places of a tile: the 64 rank rows that one item of work shrinks to.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from oneplusn.kernels.plan import BASE_SLOT, PAGE, IntArray, Plan

PLACES = 4
"""Places of a chunk."""
TILE_FIELDS = 8
CHUNK_FIELDS = 8
PLACE_FIELDS = 4
# Sections begin at 16 bytes, so that loads of neighbouring entries are wide.
ALIGN = 4


class Capacity(NamedTuple):
    """Entries that each section of a `DevicePlan` has room for."""

    rows: int
    tiles: int
    chunks: int
    places: int
    ks: int

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Return what a plan takes."""
        pages = _entry_pages(plan)
        places = _tile_places(plan, pages)
        num_bare = plan.num_rows - len(plan.rows)
        return cls(
            rows=plan.num_rows,
            tiles=len(plan.tile_rows) - 1 + -(-num_bare // plan.max_tile_rows),
            chunks=int((-(-places // PLACES)).sum()),
            places=int(pages.sum()),
            ks=len(plan.ks),
        )

    def holds(self, other: Capacity) -> bool:
        """Tell whether a plan that takes `other` fits."""
        return all(mine >= its for mine, its in zip(self, other, strict=True))

    def rounded(self) -> Self:
        """Round up to powers of two, 16 at least, so that plans of about one size share buffers."""
        return type(self)(*(max(PAGE, 1 << (size - 1).bit_length()) for size in self))


class DevicePlan:
    """A plan as the kernels read it; int32 throughout.

    Attributes:
        tile_rows: The largest number of rows of a tile.
        capacity: What the sections have room for. Entries beyond what `counts` says are undefined.
        buffer: The sections one behind the other, so that one copy moves all of them.
        counts: `[4]`: tiles of adapted rows, all tiles, chunks, adapted rows.
        rows: `[rows]`, rows of the batch: the adapted ones in sorted order, then the bare ones.
        slots: `[rows]`, their slots.
        tiles: `[tiles, 8]`: first row and number of rows (in `rows`), first place and number,
            first chunk and number, first k, number of runs. Tiles of bare rows come last, empty.
        chunks: `[chunks, 8]`: tile, its first row and number of rows, first place and number of
            places of the chunk, the tile's first k and number of runs, 0.
        places: `[places, 4]`: run, page within the run, number of the run within the tile, 0.
        ks: as `Plan.ks`: per tile a matrix `[rows, runs]` of k, or ABSENT.
    """

    CHUNK: ClassVar[int] = PLACES * PAGE
    """Rank rows of a chunk."""

    def __init__(self, tile_rows: int, capacity: Capacity, buffer: Tensor) -> None:
        """Divide a buffer of `DevicePlan.size(capacity)` entries into sections."""
        self.tile_rows = tile_rows
        self.capacity = capacity
        self.buffer = buffer
        sections = buffer.split([_aligned(size) for size in _sizes(capacity)])
        self.counts, self.rows, self.slots, tiles, chunks, places, self.ks = sections
        self.tiles = tiles.view(-1, TILE_FIELDS)
        self.chunks = chunks.view(-1, CHUNK_FIELDS)
        self.places = places.view(-1, PLACE_FIELDS)

    @classmethod
    def empty(cls, tile_rows: int, capacity: Capacity, device: torch.device | str) -> Self:
        """Allocate a plan whose entries are undefined."""
        buffer = torch.empty(cls.size(capacity), dtype=torch.int32, device=device)
        return cls(tile_rows, capacity, buffer)

    @staticmethod
    def size(capacity: Capacity) -> int:
        """Return the entries of a buffer."""
        return sum(_aligned(size) for size in _sizes(capacity))

    def to(self, device: torch.device) -> DevicePlan:
        """Return the plan in the memory of `device`, in one copy that nobody waits for."""
        if device == self.buffer.device:
            return self
        buffer = self.buffer.to(device, non_blocking=True)
        return DevicePlan(self.tile_rows, self.capacity, buffer)


def pack(plan: Plan, capacity: Capacity | None = None) -> DevicePlan:
    """Flatten a plan, in pinned host memory where there is a GPU.

    Args:
        plan: Any plan.
        capacity: Room to leave; by default what the plan takes, rounded up.
    """
    need = Capacity.of(plan)
    capacity = capacity or need.rounded()
    assert capacity.holds(need), (capacity, need)
    size = DevicePlan.size(capacity)
    buffer = torch.empty(size, dtype=torch.int32, pin_memory=torch.cuda.is_available())
    packed = DevicePlan(plan.max_tile_rows, capacity, buffer)
    num_tiles = len(plan.tile_rows) - 1
    bare = np.ones(plan.num_rows, dtype=bool)
    bare[plan.rows] = False
    _fill(packed.counts, np.array([num_tiles, need.tiles, need.chunks, len(plan.rows)]))
    _fill(packed.rows, np.concatenate([plan.rows, np.flatnonzero(bare)]))
    _fill(packed.slots, np.pad(plan.slots, (0, int(bare.sum())), constant_values=BASE_SLOT))
    tiles = _tiles(plan, need)
    _fill(packed.tiles, tiles)
    _fill(packed.chunks, _chunks(tiles[:num_tiles]))
    _fill(packed.places, _places(plan))
    _fill(packed.ks, plan.ks)
    return packed


def _tiles(plan: Plan, need: Capacity) -> IntArray:
    """Return the section `tiles`: those of the plan, then the bare rows in tiles of their own."""
    bare_starts = np.arange(len(plan.rows), plan.num_rows, plan.max_tile_rows)
    num_bare = np.minimum(plan.num_rows - bare_starts, plan.max_tile_rows)
    places = _tile_places(plan, _entry_pages(plan))
    columns = [
        (plan.tile_rows[:-1], bare_starts),
        (np.diff(plan.tile_rows), num_bare),
        *_spans(places, need.places, len(bare_starts)),
        *_spans(-(-places // PLACES), need.chunks, len(bare_starts)),
        (plan.tile_ks[:-1], np.full(len(bare_starts), need.ks)),
        (np.diff(plan.tile_runs), np.zeros(len(bare_starts))),
    ]
    return np.stack([np.concatenate(pair) for pair in columns], axis=1).astype(np.int32)


def _spans(
    sizes: IntArray, total: int, num_bare: int
) -> tuple[tuple[IntArray, IntArray], tuple[IntArray, IntArray]]:
    """Return where spans of these sizes begin, and the sizes; bare tiles have empty ones."""
    ends = np.full(num_bare, total, np.int32)
    return (np.cumsum(sizes) - sizes, ends), (sizes, np.zeros(num_bare, np.int32))


def _chunks(tiles: IntArray) -> IntArray:
    """Return the section `chunks`, from the tiles of adapted rows."""
    first_row, rows, first_place, places, first_chunk, chunks, first_k, runs = tiles.T
    tile = np.repeat(np.arange(len(tiles)), chunks)
    done = PLACES * (np.arange(len(tile)) - first_chunk[tile])
    columns = (
        tile,
        first_row[tile],
        rows[tile],
        first_place[tile] + done,
        np.minimum(places[tile] - done, PLACES),
        first_k[tile],
        runs[tile],
        np.zeros(len(tile)),
    )
    return np.stack(columns, axis=1).astype(np.int32)


def _places(plan: Plan) -> IntArray:
    """Return the section `places`."""
    pages = _entry_pages(plan)
    starts = np.cumsum(pages) - pages
    tile_starts = np.repeat(plan.tile_runs[:-1], np.diff(plan.tile_runs))
    columns = (
        np.repeat(plan.runs, pages),
        np.arange(pages.sum()) - np.repeat(starts, pages),
        np.repeat(np.arange(len(plan.runs)) - tile_starts, pages),
        np.zeros(pages.sum()),
    )
    return np.stack(columns, axis=1).astype(np.int32)


def _entry_pages(plan: Plan) -> IntArray:
    """Return the places of every entry of `plan.runs`."""
    return np.array([plan.run_pages[run] for run in plan.runs.tolist()], dtype=np.int32)


def _tile_places(plan: Plan, entry_pages: IntArray) -> IntArray:
    """Return the places of every tile."""
    bounds = np.concatenate([[0], np.cumsum(entry_pages)])
    return np.diff(bounds[plan.tile_runs]).astype(np.int32)


def _fill(section: Tensor, values: IntArray) -> None:
    section.numpy()[: len(values)] = values


def _sizes(capacity: Capacity) -> tuple[int, ...]:
    rows, tiles, chunks, places, ks = capacity
    tables = tiles * TILE_FIELDS, chunks * CHUNK_FIELDS, places * PLACE_FIELDS
    return 4, rows, rows, *tables, ks


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN

"""What a step is made of: sites with their pages and tables, and the plan that groups rows.

A *page* holds 16 rank rows. A *run* is a contiguous range of pages at a site: the experts that
tasks of a cluster share, or those that one task owns. A *slot* is what a row of the batch asks
for: a task, a blend of tasks, or the bare base. The tables change when adapters load or leave; a
`Plan` is made once per step and serves every site. docs/math.md tells the whole of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from oneplusn.kernels.cpu import SlabCache
    from oneplusn.kernels.cpu_attention import AttentionMeta
    from oneplusn.kernels.native import Arguments
    from oneplusn.kernels.workspace import Workspace

PAGE = 16
"""Rank rows of a page."""
MAX_RUNS = 16
"""Runs of a slot: eight tasks of a blend with two runs each."""
BASE_SLOT = 0
"""The slot of the bare base, which has no runs."""
ABSENT = -1
"""In `Plan.ks`: the row does not use the run."""

IntArray = NDArray[np.int32]
RunKey = tuple[str, int]
"""Content identity of a run: the adapter's digest, and the run's index within the adapter."""


Composition = tuple[tuple[int, str, tuple[RunKey, ...]], ...]
"""What the rows of a batch ask for: stretches of rows with one slot's key and run keys."""


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """Name and shape of a site: sibling linears that read the same x.

    Attributes:
        name: Common parent path and the leaf names joined by "+"; a lone linear's module path.
        in_features: Width K of x.
        slices: Widths of the outputs.
        modules: Module paths of the slices, in the same order.
    """

    name: str
    in_features: int
    slices: tuple[int, ...]
    modules: tuple[str, ...]

    @property
    def num_slices(self) -> int:
        """Number of outputs S."""
        return len(self.slices)

    @property
    def out_features(self) -> int:
        """Width N of all outputs together."""
        return sum(self.slices)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where the slices begin among the N columns, and N itself: S + 1 entries."""
        return tuple(accumulate(self.slices, initial=0))


class SiteTable:
    """Where the runs and gates of one site lie; written only when adapters load or leave.

    Attributes:
        run_first: int32 `[runs]`, the first page of a run.
        run_pages: int32 `[runs]`, its pages.
        run_rows: int32 `[runs]`, its true rank rows; 0 when it is absent at this site.
        gate_first: int32 `[slots, MAX_RUNS]`, offset in `gates` of a slot's k-th run; meaningful
            where that run has rows.
        gates: fp32 `[capacity]`, one per rank row, with the experts' scale folded in.
    """

    def __init__(
        self, *, runs: int, slots: int, gates: int, device: torch.device | str = "cpu"
    ) -> None:
        """Allocate an empty table."""
        self.run_first = torch.zeros(runs, dtype=torch.int32, device=device)
        self.run_pages = torch.zeros(runs, dtype=torch.int32, device=device)
        self.run_rows = torch.zeros(runs, dtype=torch.int32, device=device)
        self.gate_first = torch.zeros(slots, MAX_RUNS, dtype=torch.int32, device=device)
        self.gates = torch.zeros(gates, dtype=torch.float32, device=device)

    def set_run(self, run: int, first: int, rows: int) -> None:
        """Place a run of `rows` rank rows at page `first` and those after it."""
        self.run_first[run] = first
        self.run_pages[run] = num_pages(rows)
        self.run_rows[run] = rows

    def clear_run(self, run: int) -> None:
        """Make a run absent at this site."""
        self.set_run(run, 0, 0)

    def set_gates(self, slot: int, k: int, offset: int, values: torch.Tensor) -> None:
        """Store the gates `[rows]` of a slot's k-th run at `offset`."""
        self.gates[offset : offset + len(values)] = values
        self.gate_first[slot, k] = offset

    def clear_slot(self, slot: int) -> None:
        """Forget where a slot's gates lie."""
        self.gate_first[slot] = 0


def num_pages(rows: int) -> int:
    """Return the pages that `rows` rank rows take."""
    return -(-rows // PAGE)


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """What a slot stands for; the same at every site.

    Attributes:
        key: Content identity of the task or blend.
        cluster: Sorted digests of its adapters; a blend over two makes a virtual cluster.
        runs: Run ids in the order of k.
        run_keys: Content identity of each run. Orders and caches go by it, never by ids, which
            are used again for other content.
        run_pages: Pages of each run at the site where it has the most.
    """

    key: str
    cluster: tuple[str, ...]
    runs: tuple[int, ...]
    run_keys: tuple[RunKey, ...]
    run_pages: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.runs) == len(set(self.runs)) <= MAX_RUNS, self
        assert len(self.runs) == len(self.run_keys) == len(self.run_pages), self


class Segment(NamedTuple):
    """A maximal span of one slot in a plan's sorted rows."""

    slot: int
    start: int
    stop: int


class RunUse(NamedTuple):
    """A run that a row uses, and its place k among the runs of the row's slot."""

    run: int
    k: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How the rows of one step are grouped; the same for all sites. Arrays are int32.

    Sorted order goes by cluster, then slot; within a slot rows keep the batch's order. Tiles cut
    it at cluster bounds, not at task bounds. Bare rows are in no tile.

    Attributes:
        num_rows: Rows T of the batch.
        max_tile_rows: The largest number of rows that a tile may have.
        rows: `[n]`, the adapted rows of the batch, in sorted order.
        slots: `[n]`, their slots.
        tile_rows: `[tiles + 1]`, bounds of the tiles in `rows`.
        tile_runs: `[tiles + 1]`, bounds of the tiles in `runs`.
        runs: `[entries]`, per tile the union of its rows' run ids, in the order of their keys.
        tile_ks: `[tiles + 1]`, bounds of the tiles in `ks`.
        ks: per tile a matrix `[rows of the tile, runs of the tile]`: which k of the row's slot
            the run is, or ABSENT.
        segments: The slots' spans of `rows`.
        clusters: The clusters' spans of `rows`, as (start, stop).
        run_keys: Content identity of every run in `runs`, in the order of the keys.
        run_pages: Pages of every run in `runs`, at the site where it has the most.
        key: Identity of the composition: which content each row of the batch asks for.
    """

    num_rows: int
    max_tile_rows: int
    rows: IntArray
    slots: IntArray
    tile_rows: IntArray
    tile_runs: IntArray
    runs: IntArray
    tile_ks: IntArray
    ks: IntArray
    segments: tuple[Segment, ...]
    clusters: tuple[tuple[int, int], ...]
    run_keys: Mapping[int, RunKey]
    run_pages: Mapping[int, int]
    key: Composition

    @property
    def empty(self) -> bool:
        """Whether no row is adapted."""
        return not self.segments

    def uses(self, position: int) -> list[RunUse]:
        """Return the runs of the row at `position` of the sorted order, in the tile's order."""
        tile = int(np.searchsorted(self.tile_rows, position, side="right")) - 1
        runs = self.runs[self.tile_runs[tile] : self.tile_runs[tile + 1]]
        start = self.tile_ks[tile] + (position - self.tile_rows[tile]) * len(runs)
        ks = self.ks[start : start + len(runs)]
        return [
            RunUse(run, k) for run, k in zip(runs.tolist(), ks.tolist(), strict=True) if k != ABSENT
        ]


class _Tile(NamedTuple):
    """A tile while the plan is made."""

    num_rows: int
    runs: IntArray
    ks: IntArray


def build_plan(
    row_slots: Sequence[int], slots: Mapping[int, SlotInfo], *, tile_rows: int = 16
) -> Plan:
    """Group the rows of a step.

    Args:
        row_slots: The slot of each row `[T]`; BASE_SLOT for a bare row.
        slots: What the slots stand for.
        tile_rows: Largest number of rows of a tile.

    Raises:
        KeyError: When a row names a slot that is not in `slots`.
    """
    batch = np.asarray(row_slots, dtype=np.int32)
    used = set(batch.tolist()) - {BASE_SLOT}
    order = sort_slots(used, slots)
    rows, segments = _sort_rows(batch, order)
    clusters = _join_clusters(segments, slots)
    run_keys = _run_keys(order, slots)
    tiles = list(_cut_tiles(segments, clusters, slots, list(run_keys), tile_rows))
    return Plan(
        num_rows=len(batch),
        max_tile_rows=tile_rows,
        rows=rows,
        slots=batch[rows],
        tile_rows=_bounds([tile.num_rows for tile in tiles]),
        tile_runs=_bounds([tile.runs.size for tile in tiles]),
        runs=_concatenate([tile.runs for tile in tiles]),
        tile_ks=_bounds([tile.ks.size for tile in tiles]),
        ks=_concatenate([tile.ks for tile in tiles]),
        segments=segments,
        clusters=clusters,
        run_keys=run_keys,
        run_pages=_run_pages(order, slots),
        key=_composition(batch, slots),
    )


def sort_slots(chosen: Iterable[int], slots: Mapping[int, SlotInfo]) -> list[int]:
    """Put slots into the order of a plan's rows: by cluster, then by content."""
    return sorted(chosen, key=lambda slot: (slots[slot].cluster, slots[slot].key, slot))


def _sort_rows(batch: IntArray, order: Sequence[int]) -> tuple[IntArray, tuple[Segment, ...]]:
    """Sort the adapted rows by the given order of slots, and cut the result into segments."""
    ranks = np.full(max(order, default=0) + 1, len(order), dtype=np.int16)
    ranks[list(order)] = np.arange(len(order))
    row_ranks = ranks[batch]
    bounds = np.bincount(row_ranks, minlength=len(order) + 1).cumsum().tolist()
    starts = [0, *bounds]
    segments = tuple(
        Segment(slot, start, stop) for slot, start, stop in zip(order, starts, bounds, strict=False)
    )
    num_adapted = starts[len(order)]
    return np.argsort(row_ranks, kind="stable")[:num_adapted].astype(np.int32), segments


def _join_clusters(
    segments: Sequence[Segment], slots: Mapping[int, SlotInfo]
) -> tuple[tuple[int, int], ...]:
    spans: dict[tuple[str, ...], tuple[int, int]] = {}
    for segment in segments:
        cluster = slots[segment.slot].cluster
        start, _ = spans.get(cluster, (segment.start, 0))
        spans[cluster] = (start, segment.stop)
    return tuple(spans.values())


def _run_keys(order: Sequence[int], slots: Mapping[int, SlotInfo]) -> dict[int, RunKey]:
    keys: dict[int, RunKey] = {}
    for slot in order:
        keys.update(zip(slots[slot].runs, slots[slot].run_keys, strict=True))
    return dict(sorted(keys.items(), key=lambda item: item[1]))


def _run_pages(order: Sequence[int], slots: Mapping[int, SlotInfo]) -> dict[int, int]:
    pages: dict[int, int] = {}
    for slot in order:
        pages.update(zip(slots[slot].runs, slots[slot].run_pages, strict=True))
    return pages


def _cut_tiles(
    segments: Sequence[Segment],
    clusters: Sequence[tuple[int, int]],
    slots: Mapping[int, SlotInfo],
    run_order: Sequence[int],
    tile_rows: int,
) -> Iterator[_Tile]:
    """Yield the tiles of every cluster.

    Tiles of one task, which are most of them in prefill, share what they are made of.
    """
    place = {run: index for index, run in enumerate(run_order)}
    tables: dict[tuple[int, int], tuple[IntArray, IntArray]] = {}
    first = 0
    for cluster_start, cluster_stop in clusters:
        for start in range(cluster_start, cluster_stop, tile_rows):
            stop = min(start + tile_rows, cluster_stop)
            while segments[first].stop <= start:
                first += 1
            last = first
            while segments[last].stop < stop:
                last += 1
            inside = segments[first : last + 1]
            if (first, last) not in tables:
                tables[first, last] = _table([slots[s.slot].runs for s in inside], place)
            runs, table = tables[first, last]
            counts = [min(s.stop, stop) - max(s.start, start) for s in inside]
            yield _Tile(stop - start, runs, table.repeat(counts, axis=0).ravel())


def _table(
    slot_runs: Sequence[tuple[int, ...]], place: Mapping[int, int]
) -> tuple[IntArray, IntArray]:
    """Return the union of several slots' runs, and the matrix of k `[slots, runs]` over it."""
    union = sorted({run for runs in slot_runs for run in runs}, key=place.__getitem__)
    ks = [[runs.index(run) if run in runs else ABSENT for run in union] for runs in slot_runs]
    return np.array(union, dtype=np.int32), np.array(ks, dtype=np.int32)


def _composition(batch: IntArray, slots: Mapping[int, SlotInfo]) -> Composition:
    """Write the batch as (rows, key, run keys) of its stretches of one slot; bare has no key."""
    starts = np.flatnonzero(np.diff(batch, prepend=ABSENT))
    counts = np.diff(starts, append=len(batch)).tolist()
    stretches: list[tuple[int, str, tuple[RunKey, ...]]] = []
    for slot, count in zip(batch[starts].tolist(), counts, strict=True):
        if slot == BASE_SLOT:
            stretches.append((count, "", ()))
        else:
            stretches.append((count, slots[slot].key, slots[slot].run_keys))
    return tuple(stretches)


def _bounds(sizes: Sequence[int]) -> IntArray:
    return np.array([0, *accumulate(sizes)], dtype=np.int32)


def _concatenate(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """The resident experts of one site, and how to find them.

    Attributes:
        spec: Name and shape.
        a: `[P, S, 16, K]`, the pages' rank rows that x meets, apart per slice.
        b: `[P, 16, N]`, the rank rows that make the outputs, all slices side by side.
        table: Where runs and gates lie.
        slabs: What the CPU packs from the pages; shared by all sites of a pool.
        arguments: What the CPU's compiled kernel is called with; shared likewise.
        workspace: What Triton's kernels write besides outputs; shared by all sites of a pool.
    """

    spec: SiteSpec
    a: torch.Tensor
    b: torch.Tensor
    table: SiteTable
    slabs: SlabCache
    arguments: Arguments
    workspace: Workspace


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """What modules deep in the model need to know of the current step."""

    plan: Plan
    attention: AttentionMeta | None


class StepHandle:
    """Where the runner puts the step, and the wrapped modules find it; one per engine.

    Attributes:
        current: The step under way; None outside of one.
    """

    def __init__(self) -> None:
        self.current: StepContext | None = None

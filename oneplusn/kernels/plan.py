"""What a step is made of: sites with their pages and tables, and the plan that groups rows.

A *page* holds 16 rank rows. A *run* is a contiguous range of pages at a site: the experts that
tasks of a cluster share, or those that one task owns. A *slot* is what a row of the batch asks
for: a task, a blend of tasks, or the bare base. The tables change when adapters load or leave; a
`Plan` is made once per step and serves every site. docs/math.md tells the whole of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from oneplusn.kernels.tiles import ABSENT as ABSENT
from oneplusn.kernels.tiles import IntArray as IntArray
from oneplusn.kernels.tiles import Tiles, cut_tiles

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


class RunUse(NamedTuple):
    """A run that a row uses, and its place k among the runs of the row's slot."""

    run: int
    k: int


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
        order: What slots are put in order by: the cluster, then the key.
        uses: The runs with their k, in the order of their keys, which is that of every tile.
    """

    key: str
    cluster: tuple[str, ...]
    runs: tuple[int, ...]
    run_keys: tuple[RunKey, ...]
    run_pages: tuple[int, ...]
    order: str = field(init=False, repr=False, compare=False)
    uses: tuple[RunUse, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.runs) == len(set(self.runs)) <= MAX_RUNS, self
        assert len(self.runs) == len(self.run_keys) == len(self.run_pages), self
        ks = sorted(range(len(self.runs)), key=self.run_keys.__getitem__)
        # One text is compared several times as fast as a tuple of tuples; \0 is in no digest.
        object.__setattr__(self, "order", "\0".join((*self.cluster, "", self.key)))
        object.__setattr__(self, "uses", tuple(RunUse(self.runs[k], k) for k in ks))


class Segment(NamedTuple):
    """A maximal span of one slot in a plan's sorted rows."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Plan:
    """How the rows of one step are grouped; the same for all sites. Arrays are int32.

    Sorted order goes by cluster, then slot; within a slot rows keep the batch's order. Tiles cut
    it at cluster bounds, not at task bounds. Bare rows are in no tile. What not every backend
    reads is made when it is asked for.

    Attributes:
        num_rows: Rows T of the batch.
        max_tile_rows: The largest number of rows that a tile may have.
        rows: `[n]`, the adapted rows of the batch, in sorted order.
        slots: `[n]`, their slots.
        segments: The slots' spans of `rows`.
        infos: What the slot of each segment stands for.
        clusters: The clusters' spans of `rows`, as (start, stop).
    """

    num_rows: int
    max_tile_rows: int
    rows: IntArray
    slots: IntArray
    segments: tuple[Segment, ...]
    infos: tuple[SlotInfo, ...]
    clusters: tuple[tuple[int, int], ...]

    @property
    def empty(self) -> bool:
        """Whether no row is adapted."""
        return not self.segments

    @property
    def tile_rows(self) -> IntArray:
        """`[tiles + 1]`, bounds of the tiles in `rows`."""
        return self._tiles.tile_rows

    @property
    def tile_runs(self) -> IntArray:
        """`[tiles + 1]`, bounds of the tiles in `runs`."""
        return self._tiles.tile_runs

    @property
    def runs(self) -> IntArray:
        """`[entries]`, per tile the union of its rows' run ids, in the order of their keys."""
        return self._tiles.runs

    @property
    def tile_ks(self) -> IntArray:
        """`[tiles + 1]`, bounds of the tiles in `ks`."""
        return self._tiles.tile_ks

    @property
    def ks(self) -> IntArray:
        """Per tile a matrix `[rows of the tile, runs of the tile]`.

        Which k of the row's slot the run is, or ABSENT.
        """
        return self._tiles.ks

    @cached_property
    def run_keys(self) -> Mapping[int, RunKey]:
        """Content identity of every run in `runs`, in the order of the keys."""
        keys = {
            run: key
            for info in self.infos
            for run, key in zip(info.runs, info.run_keys, strict=True)
        }
        return dict(sorted(keys.items(), key=lambda item: item[1]))

    @cached_property
    def run_pages(self) -> Mapping[int, int]:
        """Pages of every run in `runs`, at the site where it has the most."""
        return {
            run: pages
            for info in self.infos
            for run, pages in zip(info.runs, info.run_pages, strict=True)
        }

    @cached_property
    def key(self) -> Composition:
        """Identity of the composition: which content each row of the batch asks for."""
        batch = np.full(self.num_rows, BASE_SLOT)
        batch[self.rows] = self.slots
        slots = (segment.slot for segment in self.segments)
        infos = dict(zip(slots, self.infos, strict=True))
        starts = np.flatnonzero(np.diff(batch, prepend=ABSENT))
        counts = np.diff(starts, append=len(batch)).tolist()
        stretches: list[tuple[int, str, tuple[RunKey, ...]]] = []
        for slot, count in zip(batch[starts].tolist(), counts, strict=True):
            info = infos.get(slot)  # bare rows have none
            stretches.append((count, info.key, info.run_keys) if info else (count, "", ()))
        return tuple(stretches)

    def uses(self, position: int) -> tuple[RunUse, ...]:
        """Return the runs of the row at `position` of the sorted order, in the tile's order."""
        return self.infos[bisect_right(self.segments, position, key=itemgetter(1)) - 1].uses

    @cached_property
    def _tiles(self) -> Tiles:
        return cut_tiles(self.segments, self.infos, self.clusters, self.max_tile_rows)


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
    order = sort_slots(set(batch.tolist()) - {BASE_SLOT}, slots)
    rows, segments = _sort_rows(batch, order)
    infos = tuple([slots[slot] for slot in order])
    return Plan(
        num_rows=len(batch),
        max_tile_rows=tile_rows,
        rows=rows,
        slots=batch[rows],
        segments=segments,
        infos=infos,
        clusters=_join_clusters(segments, infos),
    )


class Planner:
    """Makes the plans of one engine; where nothing has changed, a copy of the last one."""

    def __init__(self, slots: Mapping[int, SlotInfo]) -> None:
        """Take what the slots stand for, which may change between two plans."""
        self._slots = slots
        self._asked: tuple[list[int], int] | None = None
        self._plan = build_plan([], {})

    def plan(self, row_slots: list[int], *, tile_rows: int = 16) -> Plan:
        """Group the rows of a step, as `build_plan` does."""
        asked = (row_slots, tile_rows)
        if asked == self._asked and self._is_current(self._plan):
            return copy(self._plan)
        self._plan = build_plan(row_slots, self._slots, tile_rows=tile_rows)
        self._asked = asked
        return self._plan

    def _is_current(self, plan: Plan) -> bool:
        """Tell whether the slots of a plan still stand for what they stood for."""
        used = zip(plan.segments, plan.infos, strict=True)
        return all(self._slots.get(segment.slot) is info for segment, info in used)


def sort_slots(chosen: Iterable[int], slots: Mapping[int, SlotInfo]) -> list[int]:
    """Put slots into the order of a plan's rows: by cluster, then by content."""
    return sorted(sorted(chosen), key=lambda slot: slots[slot].order)


def _sort_rows(batch: IntArray, order: Sequence[int]) -> tuple[IntArray, tuple[Segment, ...]]:
    """Sort the adapted rows by the given order of slots, and cut the result into segments."""
    ranks = np.full(max(order, default=0) + 1, len(order), dtype=np.int16)
    ranks[list(order)] = np.arange(len(order))
    row_ranks = ranks[batch]
    bounds = np.bincount(row_ranks, minlength=len(order) + 1).cumsum().tolist()
    starts = [0, *bounds]
    segments = tuple(map(Segment, order, starts, bounds))
    num_adapted = starts[len(order)]
    return np.argsort(row_ranks, kind="stable")[:num_adapted].astype(np.int32), segments


def _join_clusters(
    segments: Sequence[Segment], infos: Sequence[SlotInfo]
) -> tuple[tuple[int, int], ...]:
    spans: dict[tuple[str, ...], tuple[int, int]] = {}
    for (_, start, stop), info in zip(segments, infos, strict=True):
        first, _ = spans.get(info.cluster, (start, 0))
        spans[info.cluster] = (first, stop)
    return tuple(spans.values())


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

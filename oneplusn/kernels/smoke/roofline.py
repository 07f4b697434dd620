"""What every timing of the kernels should be: predictions from bytes, flops and latencies.

The sites are those of a layer of Llama-3-8B, the device is an NVIDIA H200. Its two rates were
measured on such a device; the latencies are estimates from what others publish, and none of them
was measured with these kernels. `report` shows predictions beside measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from oneplusn.kernels import tuning
from oneplusn.kernels.device_plan import Capacity, DevicePlan
from oneplusn.kernels.plan import PAGE, Plan, SiteSpec, build_plan
from oneplusn.kernels.smoke.cases import Layout, Mix, equal_shares, lay_out
from oneplusn.kernels.tuning import Shape

SITES = (
    SiteSpec("qkv", 4096, (4096, 1024, 1024), ("q", "k", "v")),
    SiteSpec("o", 4096, (4096,), ("o",)),
    SiteSpec("gate_up", 4096, (14336, 14336), ("gate", "up")),
    SiteSpec("down", 14336, (4096,), ("down",)),
)
CAPABILITY = 90
MULTIPROCESSORS = 132
MEMORY_BANDWIDTH = 4.3e12
"""Bytes/s of a large copy, read and written bytes together."""
MATRIX_RATE = 790e12
"""Flop/s of a large product in bf16, on random data."""
CACHE_BANDWIDTH = 6e12
"""Bytes/s out of L2; estimate."""
PROGRAM_BANDWIDTH = 80e9
"""Bytes/s that one multiprocessor can load when it is alone; estimate."""
CACHE_BYTES = 60e6
"""L2."""
LAUNCH_US = 1.3
"""A launch within a CUDA graph; estimate."""
PATH_US = 1.5
"""Loads that wait for one another before the first useful byte comes; estimate."""
PLANE_SUM_US = 1.0
"""Where K is cut into parts: the last one to arrive sums the planes; estimate."""
HANDOVER_US = 1.2
"""From a shrink item's counter to the expand item that waits for it; estimate."""
DEPENDENT_US = 0.7
"""From the first to the second launch with programmatic dependent launch; estimate."""
FORK_US = 1.0
"""A side stream that begins and ends within a CUDA graph; estimate."""
EAGER_US = 20.0
"""Python's share of one of our launches, which take 30 to 40 arguments; estimate."""
ELEMENT = 2
"""Bytes of bf16."""

BASE = "base GEMM"
IDEAL = "delta, ideal (bytes alone)"
ONE = "one launch"
BESIDE = "base with one launch beside it"
PDL = "two launches, PDL"
TWO = "two launches"
GROUPED = "grouped_mm twice"
LOOP = "loop over tasks"
GATHERED = "gathered bmm"
EAGER_ONE = "one launch, no graph"
EAGER_TWO = "two launches, no graph"
WAYS = (BASE, IDEAL, ONE, BESIDE, PDL, TWO, GROUPED, LOOP, GATHERED, EAGER_ONE, EAGER_TWO)


@dataclass(frozen=True, slots=True)
class Case:
    """A step that is timed: so many rows, which ask for all tasks equally often."""

    rows: int
    mix: Mix

    def __str__(self) -> str:
        step = "decode" if self.rows <= tuning.DECODE_ROWS else "prefill"
        rows = "1 row" if self.rows == 1 else f"{self.rows:,} rows"
        rank = "" if self.mix.common == (16, 16) else f", rank {self.mix.common[0]}"
        return f"{step}, {rows}, {self.mix}{rank}"

    @property
    def tile_rows(self) -> int:
        """Rows of the tiles that the step is cut into."""
        return tuning.tile_rows(self.rows)


CASES = (
    Case(32, Mix(16, 4)),
    Case(1, Mix(1, 1)),
    Case(8, Mix(4, 2)),
    Case(128, Mix(16, 4)),
    Case(256, Mix(64, 8)),
    Case(256, Mix(64, 4, common=(4, 4), own=((4,),))),
    Case(2048, Mix(16, 4)),
)
"""The most telling first, in case time runs out."""
SHARING = tuple(Case(32, Mix(16, clusters)) for clusters in (1, 2, 4, 8, 16))
"""The same rows and tasks, which share more or fewer of their experts."""


def tried(way: str, case: Case) -> bool:
    """Tell whether a way makes sense: in prefill a copy of the experts for every row does not."""
    return case.rows <= tuning.DECODE_ROWS or way not in {BESIDE, GATHERED}


def base_us(spec: SiteSpec, rows: int) -> float:
    """Return the least time of x W^T: bytes or flops, whichever takes longer."""
    K, N = spec.in_features, spec.out_features
    num_bytes = ELEMENT * (K * N + rows * (K + N))
    return 1e6 * max(num_bytes / MEMORY_BANDWIDTH, 2 * rows * K * N / MATRIX_RATE)


def rank_row_bytes(spec: SiteSpec) -> tuple[int, int]:
    """Return the bytes of one rank row of A, for all slices, and of B."""
    return ELEMENT * spec.in_features * spec.num_slices, ELEMENT * spec.out_features


def weights_us(spec: SiteSpec, rank_rows: int) -> float:
    """Return the least time to read so many rank rows of A and B."""
    return 1e6 * rank_rows * sum(rank_row_bytes(spec)) / MEMORY_BANDWIDTH


def activations_us(spec: SiteSpec, rows: int) -> float:
    """Return the least time to read x once more, and to read and write y."""
    num_bytes = ELEMENT * rows * (spec.in_features + 2 * spec.out_features)
    return 1e6 * num_bytes / MEMORY_BANDWIDTH


class Phase(NamedTuple):
    """One half of our kernels' work on a step.

    Attributes:
        memory_bytes: What must come from or go to memory, once.
        cache_bytes: What all items load and store.
        flops: Of the padded products.
        items: Pieces of work, each done by one program.
    """

    memory_bytes: float
    cache_bytes: float
    flops: float
    items: int

    @property
    def us(self) -> float:
        """Time of whichever is the bottleneck; with few items a multiprocessor's own loads."""
        waves = -(-self.items // MULTIPROCESSORS)
        return 1e6 * max(
            self.memory_bytes / MEMORY_BANDWIDTH,
            self.cache_bytes / CACHE_BANDWIDTH,
            self.flops / MATRIX_RATE,
            waves * self.cache_bytes / max(self.items, 1) / PROGRAM_BANDWIDTH,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """What a case asks of any site.

    Attributes:
        plan: The step.
        need: Entries that the plan takes.
        rank_rows: Rank rows of the plan's runs, each run once.
        tiled_rank_rows: The same, each run once per tile that it is in.
        chunk_rows: Rows of x that chunks read: per chunk those of its tile.
        merged_rank_rows: Rank rows of the tasks, each with those that its cluster shares.
        gathered_rank_rows: Rank rows of the rows of the batch.
    """

    plan: Plan
    need: Capacity
    rank_rows: int
    tiled_rank_rows: int
    chunk_rows: int
    merged_rank_rows: int
    gathered_rank_rows: int

    def shrink(self, spec: SiteSpec, shape: Shape) -> Phase:
        """Return the first half: x A^T, in parts of K."""
        K, S = spec.in_features, spec.num_slices
        splits = shape.splits(K)
        block = self.plan.max_tile_rows * DevicePlan.CHUNK
        planes = 0 if splits == 1 else 2 * 4 * splits * block
        inputs = ELEMENT * K * (self.tiled_rank_rows + self.chunk_rows)
        outputs = self.need.chunks * (planes + ELEMENT * block)
        memory = self.rank_rows * rank_row_bytes(spec)[0] + ELEMENT * K * self.plan.num_rows
        return Phase(
            memory_bytes=memory,
            cache_bytes=S * (inputs + outputs),
            flops=2 * K * S * block * self.need.chunks,
            items=self.need.chunks * S * splits,
        )

    def expand(self, spec: SiteSpec, shape: Shape) -> Phase:
        """Return the second half: y + H B, in blocks of columns."""
        N, block = spec.out_features, self.plan.max_tile_rows * DevicePlan.CHUNK
        blocks = sum(-(-width // shape.block_n) for width in spec.slices)
        y = 2 * ELEMENT * N * self.plan.num_rows
        h = ELEMENT * block * blocks * self.need.chunks
        return Phase(
            memory_bytes=self.rank_rows * rank_row_bytes(spec)[1] + y,
            cache_bytes=self.tiled_rank_rows * rank_row_bytes(spec)[1] + y + h,
            flops=2 * N * block * self.need.chunks,
            items=self.need.tiles * blocks,
        )


@cache
def load_of(case: Case) -> Load:
    """Return what a case asks of any site; all rows are adapted."""
    layout, row_slots = lay_out(case.mix), equal_shares(case.mix, case.rows)
    plan = build_plan(row_slots, layout.slots, tile_rows=case.tile_rows)
    tiles = [
        _Tile(int(rows), plan.runs[first:last].tolist(), layout, plan)
        for rows, first, last in zip(
            plan.tile_rows[1:] - plan.tile_rows[:-1],
            plan.tile_runs[:-1],
            plan.tile_runs[1:],
            strict=True,
        )
    ]
    return Load(
        plan=plan,
        need=Capacity.of(plan),
        rank_rows=sum(sum(layout.ranks[run]) for run in plan.run_pages),
        tiled_rank_rows=sum(tile.rank_rows for tile in tiles),
        chunk_rows=sum(tile.rows * tile.chunks for tile in tiles),
        merged_rank_rows=sum(layout.rank_rows(segment.slot) for segment in plan.segments),
        gathered_rank_rows=sum(layout.rank_rows(slot) for slot in row_slots),
    )


class _Tile(NamedTuple):
    rows: int
    runs: list[int]
    layout: Layout
    plan: Plan

    @property
    def rank_rows(self) -> int:
        return sum(sum(self.layout.ranks[run]) for run in self.runs)

    @property
    def chunks(self) -> int:
        return -(-sum(self.plan.run_pages[run] for run in self.runs) * PAGE // DevicePlan.CHUNK)


def predict(way: str, spec: SiteSpec, case: Case) -> float:
    """Return the microseconds that a way should take for a case at a site."""
    load = load_of(case)
    if way == BASE:
        return LAUNCH_US + base_us(spec, case.rows)
    if way == IDEAL:
        return weights_us(spec, load.rank_rows) + activations_us(spec, case.rows)
    if way == BESIDE:
        return predict(BASE, spec, case) + FORK_US + predict(IDEAL, spec, case)
    if way in {GROUPED, LOOP, GATHERED}:
        return _library_us(way, spec, load)
    return _kernel_us(way, spec, load)


def _kernel_us(way: str, spec: SiteSpec, load: Load) -> float:
    """Return the time of a form of our kernels."""
    shape = tuning.shape_for(spec, load.plan.max_tile_rows, CAPABILITY)
    work = load.shrink(spec, shape).us + load.expand(spec, shape).us
    if shape.splits(spec.in_features) > 1:
        work += PLANE_SUM_US
    start = LAUNCH_US + PATH_US
    on_device = {
        ONE: start + work + HANDOVER_US,
        PDL: start + work + DEPENDENT_US,
        TWO: 2 * start + work,
    }
    if way in on_device:
        return on_device[way]
    launches, graphed = {EAGER_ONE: (1, ONE), EAGER_TWO: (2, TWO)}[way]
    return max(launches * EAGER_US, on_device[graphed])


def _library_us(way: str, spec: SiteSpec, load: Load) -> float:
    """Return the time of products by libraries, each a launch that reads the experts it needs."""
    S, rows = spec.num_slices, load.plan.num_rows
    launches, weights, passes = {
        # Per slice a product and an addition, which reads and writes once more.
        GROUPED: (1 + 2 * S, weights_us(spec, load.merged_rank_rows), 2),
        LOOP: ((1 + S) * len(load.plan.segments), weights_us(spec, load.merged_rank_rows), 1),
        # A and B are read, written for every row, and read again.
        GATHERED: (2 + 3 * S, 3 * weights_us(spec, load.gathered_rank_rows), 2),
    }[way]
    return launches * (LAUNCH_US + PATH_US) + weights + passes * activations_us(spec, rows)

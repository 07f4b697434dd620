"""Random experts at one site, in pages on a device, and their delta without any pages.

A `Mix` says how many tasks and clusters there are, a `Layout` which slots and runs that makes, a
`Bed` holds the experts of one site twice: in pages, at random places between NaN, and apart, as
they were drawn. `Bed.delta` multiplies the latter in fp64; it knows no page, table or plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oneplusn.kernels.cpu import SlabCache
from oneplusn.kernels.native import Arguments
from oneplusn.kernels.plan import (
    BASE_SLOT,
    PAGE,
    RunKey,
    Site,
    SiteSpec,
    SiteTable,
    SlotInfo,
    num_pages,
)
from oneplusn.kernels.workspace import Workspace

SPARE_PAGES = 3
BARE_SHARE = 8
"""One row in so many asks for the bare base."""
UNUSED = 0.2
"""Probability that the gate of a shared expert is zero."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Tasks in clusters of about equal size, and what they are made of.

    Attributes:
        tasks: Number of tasks J.
        clusters: Number of clusters C.
        common: Ranks of the experts that the tasks of a cluster share.
        own: Ranks of the experts that one task has; the tasks take these entries in turn.
        blends: Slots that blend two tasks, of two clusters where there are two.
    """

    tasks: int
    clusters: int
    common: tuple[int, ...] = (16, 16)
    own: tuple[tuple[int, ...], ...] = ((16,),)
    blends: int = 0

    def __str__(self) -> str:
        tasks = "1 task" if self.tasks == 1 else f"{self.tasks} tasks"
        clusters = "1 cluster" if self.clusters == 1 else f"{self.clusters} clusters"
        return f"{tasks} in {clusters}"


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The slots and runs of a mix; the same at every site.

    Attributes:
        slots: What plans are built from; tasks have the numbers from 1.
        ranks: Per run the ranks of its experts.
        blends: Per slot of a blend, the slots of its tasks and their weights.
    """

    slots: Mapping[int, SlotInfo]
    ranks: Sequence[tuple[int, ...]]
    blends: Mapping[int, tuple[tuple[int, float], ...]]

    def rank_rows(self, slot: int) -> int:
        """Return the rank rows that a slot uses."""
        return sum(sum(self.ranks[run]) for run in self.slots[slot].runs)


def lay_out(mix: Mix) -> Layout:
    """Give the runs of a mix ids and its tasks and blends slots."""
    slots: dict[int, SlotInfo] = {}
    ranks: list[tuple[int, ...]] = []
    for cluster in range(mix.clusters):
        # Sorts against the order of ids, which must not matter.
        digest = f"sha256:{mix.clusters - cluster:04d}"
        common = len(ranks)
        ranks.append(mix.common)
        first, last = (n * mix.tasks // mix.clusters for n in (cluster, cluster + 1))
        for task in range(first, last):
            runs: dict[int, RunKey] = {common: (digest, 0)}
            if own := mix.own[task % len(mix.own)]:
                runs[len(ranks)] = (digest, 1 + task)
                ranks.append(own)
            slots[1 + task] = _slot(f"{digest}/{task}", (digest,), runs, ranks)
    blends: dict[int, tuple[tuple[int, float], ...]] = {}
    for blend in range(mix.blends):
        parts = (1 + blend, 0.75), (mix.tasks - blend, -0.5)
        infos = [slots[slot] for slot, _ in parts]
        runs = dict(pair for i in infos for pair in zip(i.runs, i.run_keys, strict=True))
        cluster_of_blend = tuple(sorted({digest for i in infos for digest in i.cluster}))
        slot = 1 + mix.tasks + blend
        slots[slot] = _slot(f"blend {blend}", cluster_of_blend, runs, ranks)
        blends[slot] = parts
    return Layout(slots, tuple(ranks), blends)


def _slot(
    key: str,
    cluster: tuple[str, ...],
    runs: Mapping[int, RunKey],
    ranks: Sequence[tuple[int, ...]],
) -> SlotInfo:
    pages = tuple(num_pages(sum(ranks[run])) for run in runs)
    return SlotInfo(key, cluster, tuple(runs), tuple(runs.values()), pages)


def equal_shares(mix: Mix, num_rows: int) -> list[int]:
    """Return the slots of rows that ask for all tasks equally often, neighbours for different ones.

    With fewer rows than tasks, the first tasks have one each.
    """
    return [1 + row % mix.tasks for row in range(num_rows)]


def random_slots(layout: Layout, num_rows: int, *, seed: int) -> list[int]:
    """Draw the slots of rows; some are bare, the first never is."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(list(layout.slots), num_rows)
    bare = rng.integers(BARE_SHARE, size=num_rows) == 0
    bare[0] = False
    return [int(slot) for slot in np.where(bare, BASE_SLOT, drawn)]


@dataclass(frozen=True, slots=True, eq=False)
class Bed:
    """The experts of a mix at one site.

    Attributes:
        site: The experts in pages; what no run covers there is NaN.
        layout: Slots and runs.
        a: `[M, S, K]`, the rank rows of all runs one behind the other, in the dtype of the pages.
        b: `[M, N]`.
        starts: Where the runs begin among the M rank rows, and M.
        gates: Per slot fp32 `[rank rows of its runs]`, in the order of its runs.
    """

    site: Site
    layout: Layout
    a: Tensor
    b: Tensor
    starts: Sequence[int]
    gates: Mapping[int, Tensor]

    def rank_rows(self, slot: int) -> Tensor:
        """Return which of the M rank rows a slot uses, in the order of its runs."""
        runs = self.layout.slots[slot].runs
        parts = [torch.arange(self.starts[run], self.starts[run + 1]) for run in runs]
        return torch.cat(parts).to(self.a.device)

    def delta(self, row_slots: Sequence[int], x: Tensor) -> Tensor:
        """Return what the experts add, `[T, N]` in fp64: per slot ((x A^T) * gate) B."""
        spec = self.site.spec
        shape = len(x), spec.out_features
        delta = torch.zeros(shape, dtype=torch.float64, device=x.device)
        for slot in set(row_slots) - {BASE_SLOT}:
            rows = torch.tensor([row for row, s in enumerate(row_slots) if s == slot]).to(x.device)
            used, gates = self.rank_rows(slot), self.gates[slot].double()
            a, b, xs = self.a[used].double(), self.b[used].double(), x[rows].double()
            for s, (start, stop) in enumerate(pairwise(spec.bounds)):
                delta[rows, start:stop] = (xs @ a[:, s].T * gates) @ b[:, start:stop]
        return delta

    def copies(self, number: int) -> list[Site]:
        """Return the site several times, each with pages and tables at addresses of its own."""
        site, pages = self.site, len(self.site.a)
        a, b = site.a.repeat(number, 1, 1, 1), site.b.repeat(number, 1, 1)
        return [
            replace(
                site,
                a=a[i * pages : (i + 1) * pages],
                b=b[i * pages : (i + 1) * pages],
                table=_table_on(a.device, site.table),
            )
            for i in range(number)
        ]


def make_bed(
    spec: SiteSpec,
    mix: Mix,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> Bed:
    """Draw the experts of a mix at a site.

    A, B and gates are such that the delta of a row of normal x has elements of about 1.
    """
    layout, rng = lay_out(mix), np.random.default_rng(seed)
    starts = list(accumulate((sum(ranks) for ranks in layout.ranks), initial=0))
    generator = torch.Generator(device).manual_seed(seed)
    per_task = max(1, *map(layout.rank_rows, layout.slots))
    shape_a, shape_b = (
        (starts[-1], spec.num_slices, spec.in_features),
        (starts[-1], sum(spec.slices)),
    )
    a = torch.randn(shape_a, generator=generator, device=device) / spec.in_features**0.5
    b = torch.randn(shape_b, generator=generator, device=device) / per_task**0.5
    a, b = a.to(dtype), b.to(dtype)
    gates = _draw_gates(layout, rng)
    table = _fill_table(layout, gates, rng)
    site = _fill_pages(spec, a, b, table, starts, workspace or Workspace(device))
    return Bed(
        site, layout, a, b, starts, {slot: torch.cat(g).to(device) for slot, g in gates.items()}
    )


def _draw_gates(layout: Layout, rng: np.random.Generator) -> dict[int, list[Tensor]]:
    """Return, per slot and run, a gate for every rank row."""
    gates: dict[int, list[Tensor]] = {}
    for slot, info in layout.slots.items():
        if slot in layout.blends:
            continue
        gates[slot] = []
        for run, (_, local) in zip(info.runs, info.run_keys, strict=True):
            ranks = layout.ranks[run]
            values = rng.uniform(0.25, 2.0, len(ranks)) * rng.choice([-1.0, 1.0], len(ranks))
            if local == 0:
                values[rng.random(len(ranks)) < UNUSED] = 0.0
            gates[slot].append(torch.from_numpy(values.repeat(ranks)).float())
    for slot, parts in layout.blends.items():
        sums = {run: torch.zeros(sum(layout.ranks[run])) for run in layout.slots[slot].runs}
        for task, weight in parts:
            for run, values_of_run in zip(layout.slots[task].runs, gates[task], strict=True):
                sums[run] += weight * values_of_run
        gates[slot] = list(sums.values())
    return gates


def _fill_table(
    layout: Layout, gates: Mapping[int, Sequence[Tensor]], rng: np.random.Generator
) -> SiteTable:
    """Place the runs at random, and the gates one behind the other."""
    total = sum(len(values) for of_slot in gates.values() for values in of_slot)
    table = SiteTable(runs=len(layout.ranks), slots=1 + max(layout.slots), gates=total)
    first = 1
    for run in rng.permutation(len(layout.ranks)).tolist():
        table.set_run(run, first, sum(layout.ranks[run]))
        first += num_pages(sum(layout.ranks[run]))
    offset = 0
    for slot, of_slot in gates.items():
        for k, values in enumerate(of_slot):
            table.set_gates(slot, k, offset, values)
            offset += len(values)
    return table


def _fill_pages(
    spec: SiteSpec,
    a: Tensor,
    b: Tensor,
    table: SiteTable,
    starts: Sequence[int],
    workspace: Workspace,
) -> Site:
    """Put the rank rows into the pages that the table names; everything else is NaN."""
    pages = int(table.run_pages.sum()) + SPARE_PAGES
    shape_a = pages, spec.num_slices, PAGE, spec.in_features
    page_a = torch.full(shape_a, torch.nan, dtype=a.dtype, device=a.device)
    page_b = torch.full((pages, PAGE, spec.out_features), torch.nan, dtype=b.dtype, device=b.device)
    row = _places(table, starts)
    page, lane = (torch.from_numpy(part).to(a.device) for part in (row // PAGE, row % PAGE))
    page_a[page, :, lane] = a
    page_b[page, lane] = b
    return Site(
        spec, page_a, page_b, _table_on(a.device, table), SlabCache(0), Arguments(), workspace
    )


def _places(table: SiteTable, starts: Sequence[int]) -> NDArray[np.int64]:
    """Return for each of the M rank rows its number among the rows of all pages."""
    first = table.run_first.numpy().astype(np.int64) * PAGE
    sizes = np.diff(starts)
    return np.repeat(first - np.array(starts[:-1]), sizes) + np.arange(starts[-1])


def _table_on(device: torch.device, table: SiteTable) -> SiteTable:
    """Return a copy of a table in the memory of a device."""
    copy = SiteTable(
        runs=len(table.run_first),
        slots=len(table.gate_first),
        gates=len(table.gates),
        device=device,
    )
    for name in ("run_first", "run_pages", "run_rows", "gate_first", "gates"):
        getattr(copy, name).copy_(getattr(table, name))
    return copy

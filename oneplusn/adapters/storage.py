"""The arrays of a pool: pages, tables, and which part of them each run and slot holds.

Knows where things lie and that tables say so; who may use them, and for how long, is the pool's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oneplusn.adapters.image import PageImage, page_bytes
from oneplusn.adapters.space import Holding, Need, Place, Space, Span
from oneplusn.errors import MemoryPlanRefused
from oneplusn.kernels.buffers import zeros
from oneplusn.kernels.cpu import SlabCache
from oneplusn.kernels.plan import MAX_RUNS, PAGE, Site, SiteSpec, SiteTable, num_pages
from oneplusn.kernels.workspace import Workspace

# Gates per rank row that there is room for, on average; a common row has one for each task.
GATES_PER_ROW = 16

RUNS = Place("runs")
SLOTS = Place("slots")
Run = Mapping[str, Span]
"""Sites of a run, with its rank rows there as a part of its rank rows at all sites in turn."""


class RunGates(NamedTuple):
    """Gates of a slot for one of its runs: fp32, one per rank row, at all sites in turn."""

    run: Run
    values: Tensor

    def at(self, site: str) -> Tensor:
        """Return the gates at one site, none where the run has no rows."""
        span = self.run.get(site, Span(0, 0))
        return self.values[span.first : span.stop]


Gates = tuple[RunGates, ...]
"""Gates of a slot, in the order of k."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a version holds for its runs and its tasks' slots, or a blend for its one slot."""

    runs: tuple[Run, ...]
    gates: tuple[Gates, ...]
    holding: Holding

    @property
    def run_ids(self) -> tuple[int, ...]:
        """Ids of the runs."""
        return tuple(span.first for span in self.holding[RUNS])

    @property
    def slots(self) -> tuple[int, ...]:
        """Numbers of the slots."""
        return tuple(span.first for span in self.holding[SLOTS])

    @property
    def sites(self) -> list[str]:
        """Sites with gates, and so all with pages."""
        return [place.site for place in self.holding if place.kind == "gate rows"]

    def pages(self, site: str) -> list[Span]:
        """Pages of the runs at a site."""
        return self.holding.get(Place("pages", site), [])


class Storage:
    """Pages and tables of every site, from one byte budget, as many pages at each.

    Attributes:
        sites: By name, in the order of the specs.
        space: What is free; entry 0 of the slots, the base's, is never given out.
    """

    def __init__(
        self,
        specs: Sequence[SiteSpec],
        *,
        memory_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_tasks: int,
    ) -> None:
        # On CPU, slabs copy what is active, which may be everything that is resident.
        copies = 2 if torch.device(device).type == "cpu" else 1
        pages = _pages_per_site(specs, memory_bytes, dtype, max_tasks, copies)
        gates = pages * PAGE * GATES_PER_ROW
        runs, slots = 2 * max_tasks, 1 + max_tasks
        slabs = SlabCache((copies - 1) * pages * sum(page_bytes(spec, dtype) for spec in specs))
        workspace = Workspace(device)
        self.sites: dict[str, Site] = {}
        capacities = {RUNS: runs, SLOTS: slots}
        for spec in specs:
            a_shape = (pages, spec.num_slices, PAGE, spec.in_features)
            self.sites[spec.name] = Site(
                spec=spec,
                a=zeros(a_shape, dtype, device),
                b=zeros((pages, PAGE, spec.out_features), dtype, device),
                table=SiteTable(runs=runs, slots=slots, gates=gates, device=device),
                slabs=slabs,
                workspace=workspace,
            )
            capacities[Place("pages", spec.name)] = pages
            capacities[Place("gate rows", spec.name)] = gates
        self.space = Space(capacities)
        self.space.ranges[SLOTS].take(1)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(site.a.nbytes + site.b.nbytes for site in self.sites.values())

    def write_run(self, held: Held, site_name: str, run: int, a: Tensor, b: Tensor) -> int:
        """Copy the pages of a run `[n, S, 16, K]`, `[n, 16, N]` in; return their bytes."""
        site, span = self.sites[site_name], held.pages(site_name)[run]
        site.a[span.first : span.stop] = a
        site.b[span.first : span.stop] = b
        site.table.set_run(
            held.holding[RUNS][run].first, span.first, held.runs[run][site_name].count
        )
        return a.nbytes + b.nbytes

    def write_gates(self, held: Held, site_name: str) -> None:
        """Copy the gates of all slots at one site in."""
        table = self.sites[site_name].table
        offset = held.holding[Place("gate rows", site_name)][0].first
        for slot, gates in zip(held.slots, held.gates, strict=True):
            for k, run_gates in enumerate(gates):
                values = run_gates.at(site_name)
                if len(values):
                    table.set_gates(slot, k, offset, values)
                    offset += len(values)

    def free(self, held: Held) -> None:
        """Give everything back; tables read as if it had never been."""
        for name in held.sites:
            table = self.sites[name].table
            for column in (table.run_first, table.run_pages, table.run_rows):
                column[list(held.run_ids)] = 0
            table.gate_first[list(held.slots)] = 0
        self.space.give(held.holding)

    def compact(self, everything: Sequence[Held]) -> int:
        """Move pages and gates together, given all that hold some; return the bytes of pages."""
        moved = 0
        holdings = [held.holding for held in everything]
        for name, site in self.sites.items():
            for owner, run, old in self.space.slide(Place("pages", name), holdings):
                # A copy, for the new place may overlap the old.
                a, b = (array[old.first : old.stop].clone() for array in (site.a, site.b))
                moved += self.write_run(everything[owner], name, run, a, b)
            for owner, _, _ in self.space.slide(Place("gate rows", name), holdings):
                self.write_gates(everything[owner], name)
        return moved

    def check(self, written: Sequence[Held], unwritten: Sequence[Held]) -> None:
        """Assert that tables say what is held, and nothing else, and that runs end in zeros.

        What is `unwritten` may have anything in its place.
        """
        for site in self.sites.values():
            _check_runs(site, written, unwritten)
            _check_gates(site, written, unwritten)


def runs_of(image: PageImage) -> tuple[Run, ...]:
    """Return the runs of an image, in the order of its local indices."""
    runs: list[dict[str, Span]] = [{} for _ in range(image.num_runs)]
    ends = [0] * image.num_runs
    for name, site in image.sites.items():
        for run, rows in enumerate(site.run_rows):
            if rows:
                runs[run][name] = Span(ends[run], rows)
                ends[run] += rows
    return tuple(runs)


def gates_of(image: PageImage, task: str, runs: Sequence[Run]) -> Gates:
    """Return the gates of a task for its runs, which are some of `runs`."""
    by_site = [site.gates[task] for site in image.sites.values()]
    return tuple(
        RunGates(runs[run], torch.cat([gates[k] for gates in by_site]))
        for k, run in enumerate(image.task_runs[task])
    )


def need_of(runs: Sequence[Run], gates: Sequence[Gates]) -> Need:
    """Return what these runs, and slots with these gates, take."""
    sites = dict.fromkeys(name for run in runs for name in run)
    rows = Counter[str]()
    for run_gates in (part for slot in gates for part in slot):
        rows.update({name: span.count for name, span in run_gates.run.items()})
    return {
        SLOTS: [1] * len(gates),
        RUNS: [1] * len(runs),
        **{
            Place("pages", name): [num_pages(run[name].count if name in run else 0) for run in runs]
            for name in sites
        },
        **{Place("gate rows", name): [count] for name, count in rows.items()},
    }


def _pages_per_site(
    specs: Sequence[SiteSpec], memory_bytes: int, dtype: torch.dtype, max_tasks: int, copies: int
) -> int:
    """Divide the budget; tables come off it first, gates and slabs go with the pages."""
    int32, fp32 = torch.int32.itemsize, torch.float32.itemsize
    runs, slots = 2 * max_tasks, 1 + max_tasks
    tables = len(specs) * (3 * runs + MAX_RUNS * slots) * int32
    gates = PAGE * GATES_PER_ROW * fp32
    page = sum(copies * page_bytes(spec, dtype) + gates for spec in specs)
    if memory_bytes < tables + page:
        msg = (
            f"{memory_bytes} bytes of adapter memory hold no page at each of {len(specs)} sites: "
            f"one takes {page} bytes, beside {tables} for the tables of {max_tasks} tasks; "
            f"give at least {tables + page}, or allow fewer tasks"
        )
        raise MemoryPlanRefused(msg)
    return (memory_bytes - tables) // page


def _check_runs(site: Site, written: Sequence[Held], unwritten: Sequence[Held]) -> None:
    name, table = site.spec.name, site.table
    seen = torch.stack([table.run_first, table.run_pages, table.run_rows]).T.cpu()
    seen[[id_ for held in unwritten for id_ in held.run_ids]] = 0
    expected = torch.zeros_like(seen)
    for held in written:
        for id_, run, span in zip(held.run_ids, held.runs, held.pages(name), strict=False):
            if name not in run:
                continue
            rows = run[name].count
            expected[id_] = torch.tensor([span.first, span.count, rows])
            for array in (site.a.transpose(1, 2), site.b):
                beyond = array[span.first : span.stop].flatten(0, 1)[rows:]
                assert not beyond.any(), f"{name}: run {id_} goes beyond its {rows} rows"
    assert torch.equal(seen, expected), f"{name}: the table's runs are not those that hold pages"


def _check_gates(site: Site, written: Sequence[Held], unwritten: Sequence[Held]) -> None:
    name, table = site.spec.name, site.table
    first, gates = table.gate_first.cpu(), table.gates.cpu()
    here = {slot for held in (*written, *unwritten) if name in held.sites for slot in held.slots}
    free = sorted(set(range(len(first))) - here)
    assert not first[free].any(), f"{name}: gates of a slot that holds none"
    for held in written:
        if name not in held.sites:
            continue
        span = held.holding[Place("gate rows", name)][0]
        start = span.first
        for slot, of_slot in zip(held.slots, held.gates, strict=True):
            for k, values in enumerate(part.at(name) for part in of_slot):
                if len(values):
                    stop = start + len(values)
                    assert first[slot, k] == start, f"{name}: slot {slot}, k {k} lies elsewhere"
                    assert torch.equal(gates[start:stop], values), f"{name}: slot {slot}, k {k}"
                    start = stop
        assert start == span.stop, f"{name}: {start - span.first} gates where {span.count} are held"

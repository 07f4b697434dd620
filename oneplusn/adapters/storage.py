"""The arrays of a pool: pages, tables, and which part of them each version and slot holds.

Knows where things lie and that tables say so; who may use them, and for how long, is the pool's.
The tables of all sites are rows of a few tensors, so that a version comes and goes in a handful of
operations, however many sites the model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from oneplusn.adapters.image import PageImage, page_bytes
from oneplusn.adapters.space import Holding, Need, Place, Space, Span
from oneplusn.errors import AdapterIncompatible, MemoryPlanRefused
from oneplusn.kernels import cpu
from oneplusn.kernels.buffers import zeros
from oneplusn.kernels.native import Arguments
from oneplusn.kernels.ops import backend
from oneplusn.kernels.plan import MAX_RUNS, PAGE, IntArray, Site, SiteSpec, SiteTable
from oneplusn.kernels.workspace import Workspace

# Gates per rank row that there is room for, on average; a common row has one for each task.
GATES_PER_ROW = 16
# Bytes of pages that are copied at a time: large enough for the speed of memory, small enough
# that a step waits no longer than a tenth of a millisecond for it.
PIECE_BYTES = 2**18

RUNS = Place("runs")
SLOTS = Place("slots")
GATES = Place("gate rows")


class RunGates(NamedTuple):
    """Gates of a slot for one of its runs.

    Attributes:
        rows: Rank rows of the run at each site of the pool.
        values: fp32, one per rank row, at all sites in turn.
    """

    rows: IntArray
    values: Tensor


Gates = tuple[RunGates, ...]
"""Gates of a slot, in the order of k."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What an image, or a blend, asks of a pool.

    Attributes:
        run_rows: `[runs, sites]`, rank rows of the runs that it brings along.
        slot_rows: Per slot `[k, sites]`, rank rows of the runs that it gates.
    """

    run_rows: IntArray
    slot_rows: tuple[IntArray, ...]

    @property
    def run_pages(self) -> IntArray:
        """Pages of the runs, `[runs, sites]`."""
        return -(-self.run_rows // PAGE)

    @property
    def num_gates(self) -> int:
        """Gates of all slots."""
        return sum(int(rows.sum()) for rows in self.slot_rows)


@dataclass(slots=True, eq=False)
class Held:
    """What a version holds for its runs and its tasks' slots, or a blend for its one slot.

    Attributes:
        layout: How it is made up.
        holding: Where it lies.
        gates: Of its slots, as far as they are written.
        num_gates: How many that are.
        listed: Whether the tables name it.
    """

    layout: Layout
    holding: Holding
    gates: tuple[Gates, ...] = ()
    num_gates: int = 0
    listed: bool = False

    @property
    def run_ids(self) -> list[int]:
        """Ids of the runs."""
        return [span.first for span in self.holding[RUNS]]

    @property
    def slots(self) -> list[int]:
        """Numbers of the slots."""
        return [span.first for span in self.holding[SLOTS]]

    @property
    def first_gate(self) -> int:
        """Where its gates begin."""
        return self.holding[GATES][0].first

    def pages(self, place: Place) -> Span:
        """Pages of all runs at a site, one run after the other."""
        return self.holding[place][0] if place in self.holding else Span(0, 0)


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
        # Slabs copy what is active, which may be everything that is resident.
        copies = 2 if backend(torch.device(device).type) is cpu.gated_delta else 1
        pages = _pages_per_site(specs, memory_bytes, dtype, max_tasks, copies)
        runs, slots = 2 * max_tasks, 1 + max_tasks
        gates = len(specs) * pages * PAGE * GATES_PER_ROW
        slabs = cpu.SlabCache((copies - 1) * pages * sum(page_bytes(spec, dtype) for spec in specs))
        arguments, workspace = Arguments(), Workspace(device)
        # First page, pages and rank rows of every run; the offsets of gates, over all sites.
        self._runs = torch.zeros(3, len(specs), runs, dtype=torch.int32, device=device)
        self._gate_first = torch.zeros(
            len(specs), slots, MAX_RUNS, dtype=torch.int32, device=device
        )
        self._gates = zeros((gates,), torch.float32, device)
        self._places = [Place("pages", spec.name) for spec in specs]
        self.sites: dict[str, Site] = {}
        for index, spec in enumerate(specs):
            self.sites[spec.name] = Site(
                spec=spec,
                a=zeros((pages, spec.num_slices, PAGE, spec.in_features), dtype, device),
                b=zeros((pages, PAGE, spec.out_features), dtype, device),
                table=self._table(index),
                slabs=slabs,
                arguments=arguments,
                workspace=workspace,
            )
        capacities = dict.fromkeys(self._places, pages)
        self.space = Space({SLOTS: slots, RUNS: runs, GATES: gates, **capacities})
        self.space.ranges[SLOTS].take(1)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(site.a.nbytes + site.b.nbytes for site in self.sites.values())

    def layout(self, image: PageImage) -> Layout:
        """Return what an image asks of this pool.

        Raises:
            AdapterIncompatible: When it was laid out for another base model.
        """
        _check_sites(image, self.sites)
        absent = (0,) * image.num_runs
        rows = [image.sites[n].run_rows if n in image.sites else absent for n in self.sites]
        run_rows = np.array(rows, np.int32).reshape(len(rows), image.num_runs).T
        slot_rows = tuple(run_rows[list(image.task_runs[task])] for task in image.tasks)
        layout = Layout(run_rows, slot_rows)
        _check_pages(image, self.sites, layout.run_pages.sum(axis=0).tolist())
        return layout

    def need(self, layout: Layout) -> Need:
        """Return what a layout takes of every place."""
        pages = layout.run_pages.sum(axis=0).tolist()
        return {
            SLOTS: [1] * len(layout.slot_rows),
            RUNS: [1] * len(layout.run_rows),
            GATES: [layout.num_gates],
            **{place: [count] for place, count in zip(self._places, pages, strict=True) if count},
        }

    def write_pages(self, held: Held, image: PageImage) -> Iterator[int]:
        """Copy the pages of an image in; yield after every piece the bytes of it."""
        for name, source in image.sites.items():
            site, place = self.sites[name], Place("pages", name)
            pages = max(1, PIECE_BYTES // page_bytes(site.spec, site.a.dtype))
            for start in range(0, len(source.a), pages):
                a, b = (part[start : start + pages] for part in (source.a, source.b))
                # Asked for anew each time, as compaction moves what is being written too.
                first = held.pages(place).first + start
                site.a[first : first + len(a)] = a
                site.b[first : first + len(b)] = b
                yield a.nbytes + b.nbytes

    def write_gates(self, held: Held, gates: Gates) -> int:
        """Copy the gates of the next slot in; return their bytes."""
        values = torch.cat([part.values for part in gates])
        start = held.first_gate + held.num_gates
        self._gates[start : start + len(values)] = values
        held.gates += (gates,)
        held.num_gates += len(values)
        return values.nbytes

    def enlist(self, held: Held) -> None:
        """Enter what is written into the tables."""
        pages = np.array([held.pages(place).first for place in self._places], np.int32)
        self._set_runs(held, slice(None), pages)
        self._set_gate_first(held)
        held.listed = True

    def delist(self, held: Held) -> None:
        """Make the tables read as if it had never been."""
        if held.listed:
            self._runs[:, :, held.run_ids] = 0
            self._gate_first[:, held.slots] = 0
            held.listed = False

    def compact(self, site_name: str, everything: Sequence[Held]) -> int:
        """Move the pages of a site together, given all that hold some; return the bytes moved."""
        site, place = self.sites[site_name], Place("pages", site_name)
        index, moved = self._places.index(place), 0
        for owner, _, old in self.space.slide(place, [held.holding for held in everything]):
            held = everything[owner]
            new = held.pages(place)
            for array in (site.a, site.b):
                # A copy, for the new place may overlap the old.
                array[new.first : new.stop] = array[old.first : old.stop].clone()
                moved += array[new.first : new.stop].nbytes
            if held.listed:
                self._set_runs(held, slice(index, index + 1), np.array([new.first], np.int32))
        return moved

    def compact_gates(self, everything: Sequence[Held]) -> None:
        """Move the gates together, given all that hold some."""
        for owner, _, old in self.space.slide(GATES, [held.holding for held in everything]):
            held = everything[owner]
            new = held.holding[GATES][0]
            self._gates[new.first : new.stop] = self._gates[old.first : old.stop].clone()
            if held.listed:
                self._set_gate_first(held)

    def check(self, everything: Sequence[Held]) -> None:
        """Assert that tables name what is listed, and nothing else, and that runs end in zeros."""
        listed = [held for held in everything if held.listed]
        for index, (place, site) in enumerate(zip(self._places, self.sites.values(), strict=True)):
            _check_runs(index, place, site, listed)
            _check_gates(index, site, listed)

    def _table(self, site: int) -> SiteTable:
        """Return the tables of one site: a row of those of all."""
        table = SiteTable(runs=0, slots=0, gates=0, device=self._gates.device)
        table.run_first, table.run_pages, table.run_rows = self._runs[:, site]
        table.gate_first, table.gates = self._gate_first[site], self._gates
        return table

    def _set_runs(self, held: Held, sites: slice, first_pages: IntArray) -> None:
        """Say at some sites where the runs lie, given the first page of all at each of these."""
        if not held.run_ids:
            return
        rows, pages = held.layout.run_rows[:, sites], held.layout.run_pages[:, sites]
        first = np.where(rows > 0, first_pages + pages.cumsum(axis=0) - pages, 0)
        columns = np.stack([first, pages, rows]).astype(np.int32).transpose(0, 2, 1)
        self._runs[:, sites, held.run_ids] = torch.from_numpy(columns).to(self._runs.device)

    def _set_gate_first(self, held: Held) -> None:
        """Say where the gates of every slot lie."""
        first = np.zeros((len(self._places), len(held.slots), MAX_RUNS), np.int32)
        start = held.first_gate
        for slot, rows in enumerate(held.layout.slot_rows):
            counts = rows.ravel()
            starts = np.where(counts > 0, start + counts.cumsum() - counts, 0)
            first[:, slot, : len(rows)] = starts.reshape(rows.shape).T
            start += int(counts.sum())
        self._gate_first[:, held.slots] = torch.from_numpy(first).to(self._gate_first.device)


def gates_of(image: PageImage, task: str, layout: Layout) -> Gates:
    """Return the gates of a task.

    Raises:
        AdapterIncompatible: When they are not as many as its runs have rank rows.
    """
    by_site = [site.gates[task] for site in image.sites.values()]
    gates = tuple(
        RunGates(layout.run_rows[run], torch.cat([gates[k] for gates in by_site]))
        for k, run in enumerate(image.task_runs[task])
    )
    for rows, values in gates:
        if len(values) != rows.sum():
            msg = f"{image.digest} has {len(values)} gates of {task!r} for {rows.sum()} rank rows"
            raise AdapterIncompatible(f"{msg}; lay it out anew")
    return gates


def _check_sites(image: PageImage, sites: Mapping[str, Site]) -> None:
    """Refuse an image for other sites than these, or in another order.

    Raises:
        AdapterIncompatible: It is.
    """
    here = [name for name in sites if name in image.sites]
    if here != list(image.sites):
        first = next(name for name in image.sites if name not in sites or name != here.pop(0))
        msg = (
            f"{image.digest} is laid out for another base: {first} is not among this one's "
            f"{len(sites)} sites, or not in its place; lay it out for this base"
        )
        raise AdapterIncompatible(msg)


def _check_pages(image: PageImage, sites: Mapping[str, Site], pages: Iterable[int]) -> None:
    """Refuse an image whose pages would not fit into the arrays that they are copied to.

    Raises:
        AdapterIncompatible: Those of a site do not.
    """
    for (name, site), count in zip(sites.items(), pages, strict=True):
        part = image.sites.get(name)
        if part is None:
            continue
        a, b = (count, *site.a.shape[1:]), (count, *site.b.shape[1:])
        fits = part.a.shape == a and part.b.shape == b
        if not fits or not part.a.dtype == part.b.dtype == site.a.dtype:
            msg = (
                f"{image.digest} has pages {list(part.a.shape)} and {list(part.b.shape)} of "
                f"{part.a.dtype} at {name}, this base takes {list(a)} and {list(b)} of "
                f"{site.a.dtype}; lay it out for this base"
            )
            raise AdapterIncompatible(msg)


def _pages_per_site(
    specs: Sequence[SiteSpec], memory_bytes: int, dtype: torch.dtype, max_tasks: int, copies: int
) -> int:
    """Divide the budget; tables come off it first, gates and slabs go with the pages.

    Raises:
        MemoryPlanRefused: It holds no page at each site.
    """
    if not specs:
        return 0
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


def _check_runs(index: int, place: Place, site: Site, listed: Sequence[Held]) -> None:
    name, table = site.spec.name, site.table
    seen = torch.stack([table.run_first, table.run_pages, table.run_rows]).T.cpu()
    expected = torch.zeros_like(seen)
    for held in listed:
        first = held.pages(place).first
        for id_, rows in zip(held.run_ids, held.layout.run_rows[:, index].tolist(), strict=True):
            if not rows:
                continue
            count = -(-rows // PAGE)
            expected[id_] = torch.tensor([first, count, rows])
            for array in (site.a.transpose(1, 2), site.b):
                beyond = array[first : first + count].flatten(0, 1)[rows:]
                assert not beyond.any(), f"{name}: run {id_} goes beyond its {rows} rows"
            first += count
        assert first == held.pages(place).stop, f"{name}: pages that no run of a version has"
    assert torch.equal(seen, expected), f"{name}: the table's runs are not those that hold pages"


def _check_gates(index: int, site: Site, listed: Sequence[Held]) -> None:
    name, table = site.spec.name, site.table
    first, gates = table.gate_first.cpu(), table.gates.cpu()
    here = {slot for held in listed for slot in held.slots}
    free = sorted(set(range(len(first))) - here)
    assert not first[free].any(), f"{name}: gates of a slot that holds none"
    for held in listed:
        for slot, of_slot in zip(held.slots, held.gates, strict=True):
            for k, (rows, values) in enumerate(of_slot):
                before, count = int(rows[:index].sum()), int(rows[index])
                start = int(first[slot, k])
                expected = values[before : before + count]
                span = held.holding[GATES][0]
                inside = span.first <= start and start + count <= span.stop
                assert inside or not count, f"{name}: slot {slot}, k {k} lies elsewhere"
                assert torch.equal(gates[start : start + count], expected), f"{name}: {slot}, {k}"

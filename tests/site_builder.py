"""Sites full of experts, laid out by hand, and the delta computed without pages, runs or plans.

A `World` keeps the experts as they are and each slot's gates per expert. `World.delta` is what a
base with those experts merged into its weights would add. The same experts are put into pages at
random places; everything else there holds NaN, so whoever reads a padding row or a foreign page
shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from oneplusn.kernels.cpu import SlabCache
from oneplusn.kernels.native import Arguments
from oneplusn.kernels.plan import PAGE, Site, SiteSpec, SiteTable, SlotInfo, num_pages
from oneplusn.kernels.workspace import Workspace

CAPACITY_RUNS = 64
CAPACITY_SLOTS = 64
CAPACITY_GATES = 16_384
MISS = 0.2  # probability that a gate of a common expert is zero, or a run absent if allowed


@dataclass(frozen=True)
class Cluster:
    """Ranks of the shared experts, and for each task those of its own (none: only the shared)."""

    common: tuple[int, ...]
    own: tuple[tuple[int, ...], ...]
    digest: str = ""


@dataclass(frozen=True)
class Expert:
    a: torch.Tensor  # [S, R, K]
    b: torch.Tensor  # [R, N]


@dataclass(repr=False)
class World:
    """Several sites with the same runs and slots.

    Attributes:
        sites: The sites under test.
        slots: What plans are built from.
        experts: Per site, the experts of every run.
        gates: Per site and slot, a gate for each expert (run, index) of the slot.
        tasks: Slots of the tasks, in the order of the clusters.
    """

    sites: list[Site]
    slots: dict[int, SlotInfo] = field(default_factory=dict)
    experts: list[dict[int, list[Expert]]] = field(default_factory=list)
    gates: list[dict[int, dict[tuple[int, int], float]]] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)

    @property
    def site(self) -> Site:
        return self.sites[0]

    def weight(self, slot: int, *, site: int = 0) -> torch.Tensor:
        """Merge a slot's experts into what could be added to W: sum of G * B A, `[N, K]`, fp64."""
        spec = self.sites[site].spec
        weight = torch.zeros(spec.out_features, spec.in_features, dtype=torch.float64)
        for (run, index), gate in self.gates[site].get(slot, {}).items():
            expert = self.experts[site][run][index]
            b, a = expert.b.double().split(spec.slices, dim=1), expert.a.double()
            weight += gate * torch.cat([b[s].T @ a[s] for s in range(spec.num_slices)])
        return weight

    def delta(self, row_slots: Sequence[int], x: torch.Tensor, *, site: int = 0) -> torch.Tensor:
        """Multiply every row with its slot's merged weight: `[T, N]` in fp64."""
        weights = {slot: self.weight(slot, site=site) for slot in set(row_slots)}
        rows = zip(row_slots, x.double(), strict=True)
        return torch.stack([weights[slot] @ row for slot, row in rows])


def build_world(
    clusters: Sequence[Cluster],
    *,
    in_features: int = 24,
    slices: Sequence[Sequence[int]] = ((16,),),
    dtype: torch.dtype = torch.float32,
    blends: Sequence[Sequence[tuple[int, float]]] = (),
    partial: bool = False,
    seed: int = 0,
    budget: int = 2**30,
) -> World:
    """Lay out clusters at one site per entry of `slices`.

    `blends` name tasks by number, with weights. With `partial`, some runs are absent at a site.
    """
    generator = torch.Generator().manual_seed(seed)
    world = World(_empty_sites(in_features, slices, budget))
    ranks = _name_slots(world, clusters)
    for index, site in enumerate(world.sites):
        experts = {
            run: [] if partial and _chance(generator) < MISS else _experts(rs, site, generator)
            for run, rs in ranks.items()
        }
        world.experts.append(
            {run: [Expert(e.a.to(dtype), e.b.to(dtype)) for e in es] for run, es in experts.items()}
        )
        world.sites[index] = _fill_pages(site, world.experts[index], dtype, generator)
        world.gates.append(_draw_gates(world, index, generator))
    for blend in blends:
        _add_blend(world, blend)
    for index, site in enumerate(world.sites):
        _fill_gates(world, index, site)
    return world


def _chance(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


def _empty_sites(in_features: int, slices: Sequence[Sequence[int]], budget: int) -> list[Site]:
    slabs, arguments, workspace = SlabCache(budget), Arguments(), Workspace("cpu")
    sites = []
    for index, widths in enumerate(slices):
        modules = tuple(f"layers.{index}.m{s}" for s in range(len(widths)))
        spec = SiteSpec("+".join(modules), in_features, tuple(widths), modules)
        table = SiteTable(runs=CAPACITY_RUNS, slots=CAPACITY_SLOTS, gates=CAPACITY_GATES)
        table.gates.fill_(torch.nan)
        sites.append(Site(spec, torch.empty(0), torch.empty(0), table, slabs, arguments, workspace))
    return sites


def _name_slots(world: World, clusters: Sequence[Cluster]) -> dict[int, tuple[int, ...]]:
    """Give every run an id and every task a slot; return the experts' ranks per run."""
    ranks: dict[int, tuple[int, ...]] = {}
    for number, cluster in enumerate(clusters):
        # Digests that sort against the order of ids, which must not matter.
        digest = cluster.digest or f"sha256:{len(clusters) - number:04d}"
        common = len(ranks) if cluster.common else None
        if common is not None:
            ranks[common] = cluster.common
        for task, own in enumerate(cluster.own):
            runs = [] if common is None else [(common, (digest, 0))]
            if own:
                runs.append((len(ranks), (digest, 1 + task)))
                ranks[len(ranks)] = own
            slot = 1 + len(world.slots)
            world.slots[slot] = SlotInfo(
                key=f"{digest}/{task}",
                cluster=(digest,),
                runs=tuple(run for run, _ in runs),
                run_keys=tuple(key for _, key in runs),
                run_pages=tuple(num_pages(sum(ranks[run])) for run, _ in runs),
            )
            world.tasks.append(slot)
    return ranks


def _experts(ranks: Sequence[int], site: Site, generator: torch.Generator) -> list[Expert]:
    spec, total = site.spec, max(sum(ranks), 1)
    return [
        Expert(
            a=torch.randn(spec.num_slices, rank, spec.in_features, generator=generator)
            / spec.in_features**0.5,
            b=torch.randn(rank, spec.out_features, generator=generator) / total**0.5,
        )
        for rank in ranks
    ]


def _fill_pages(
    site: Site, experts: dict[int, list[Expert]], dtype: torch.dtype, generator: torch.Generator
) -> Site:
    """Put each run's experts one behind the other into pages of its own, in a random order."""
    spec = site.spec
    rows = {run: sum(len(e.b) for e in es) for run, es in experts.items()}
    pages = sum(map(num_pages, rows.values())) + 3
    a = torch.full((pages, spec.num_slices, PAGE, spec.in_features), torch.nan, dtype=dtype)
    b = torch.full((pages, PAGE, spec.out_features), torch.nan, dtype=dtype)
    first = 1
    for index in torch.randperm(len(rows), generator=generator).tolist():
        run = list(rows)[index]
        site.table.set_run(run, first, rows[run])
        row = first * PAGE
        for expert in experts[run]:
            for r in range(len(expert.b)):
                a[row // PAGE, :, row % PAGE] = expert.a[:, r]
                b[row // PAGE, row % PAGE] = expert.b[r]
                row += 1
        first += num_pages(rows[run])
    return replace(site, a=a, b=b)


def _draw_gates(
    world: World, site: int, generator: torch.Generator
) -> dict[int, dict[tuple[int, int], float]]:
    """Draw gates between -2 and 2; some of the shared experts are not used by a task."""
    gates: dict[int, dict[tuple[int, int], float]] = {}
    for slot in world.tasks:
        info = world.slots[slot]
        gates[slot] = {}
        for run, (_, local) in zip(info.runs, info.run_keys, strict=True):
            for index in range(len(world.experts[site][run])):
                value = torch.rand((), generator=generator).mul(4).sub(2).item()
                unused = local == 0 and _chance(generator) < MISS
                gates[slot][run, index] = 0.0 if unused else value
    return gates


def _add_blend(world: World, blend: Sequence[tuple[int, float]]) -> None:
    """Add a slot with the union of the tasks' runs and the weighted sum of their gates."""
    infos = [(world.slots[world.tasks[task]], weight) for task, weight in blend]
    runs = dict(pair for info, _ in infos for pair in zip(info.runs, info.run_keys, strict=True))
    pages = {run: n for info, _ in infos for run, n in zip(info.runs, info.run_pages, strict=True)}
    slot = 1 + len(world.slots)
    world.slots[slot] = SlotInfo(
        key="+".join(f"{info.key}*{weight}" for info, weight in infos),
        cluster=tuple(sorted({digest for info, _ in infos for digest in info.cluster})),
        runs=tuple(runs),
        run_keys=tuple(runs.values()),
        run_pages=tuple(pages[run] for run in runs),
    )
    for gates in world.gates:
        gates[slot] = {}
        for task, weight in blend:
            for expert, gate in gates[world.tasks[task]].items():
                gates[slot][expert] = gates[slot].get(expert, 0.0) + weight * gate


def _fill_gates(world: World, index: int, site: Site) -> None:
    offset = 5
    for slot, info in world.slots.items():
        for k, run in enumerate(info.runs):
            values = [
                world.gates[index][slot][run, e]
                for e, expert in enumerate(world.experts[index][run])
                for _ in range(len(expert.b))
            ]
            site.table.set_gates(slot, k, offset, torch.tensor(values))
            offset += len(values)

"""Replay one CUDA graph of a layer, whose plan is overwritten between replays, and compare bits.

The graph holds the launches of all sites of a layer, which share a workspace, as in serving. What
it should give was computed before, launch by launch, with other buffers and other capacities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from oneplusn.kernels.device_plan import Capacity, DevicePlan, pack
from oneplusn.kernels.plan import BASE_SLOT, Site, SiteSpec, build_plan
from oneplusn.kernels.smoke.cases import Bed, Mix, make_bed, random_slots
from oneplusn.kernels.smoke.checks import BITS_OF, ONE, PDL
from oneplusn.kernels.smoke.outcome import Outcome
from oneplusn.kernels.smoke.timing import Graph, why_no_pdl
from oneplusn.kernels.triton_backend import launch, launch_two
from oneplusn.kernels.workspace import Workspace

DTYPE = torch.bfloat16
NEIGHBOUR_SIZE = 4096
NEIGHBOUR_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Size:
    """What is replayed how often.

    Attributes:
        replays: Of the graph.
        plans: Different steps, taken in turn.
        rows: Of every step.
    """

    replays: int
    plans: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The sites of a layer, and the steps that are replayed over them.

    Attributes:
        beds: The sites, with one workspace.
        xs: Per site `[T, K]`, where the graph reads.
        ys: Per site `[T, N]`, where the graph writes.
        before: Per site, what the outputs hold before a replay.
        plans: The steps on the device, of one capacity.
        expected: Per step and site what two launches gave, outside of a graph.
    """

    beds: Sequence[Bed]
    xs: Sequence[Tensor]
    ys: Sequence[Tensor]
    before: Sequence[Tensor]
    plans: Sequence[DevicePlan]
    expected: Sequence[Sequence[Tensor]]


@lru_cache(maxsize=1)
def make_layer(specs: tuple[SiteSpec, ...], mix: Mix, size: Size, device: torch.device) -> Layer:
    """Draw a layer and its steps, from one with all rows adapted to one with all rows bare."""
    workspace = Workspace(device)
    beds = [
        make_bed(spec, mix, dtype=DTYPE, device=device, seed=seed, workspace=workspace)
        for seed, spec in enumerate(specs)
    ]
    xs = [torch.randn(size.rows, s.in_features, device=device).to(DTYPE) for s in specs]
    before = [torch.randn(size.rows, s.out_features, device=device).to(DTYPE) for s in specs]
    slots = beds[0].layout.slots
    plans = [build_plan(rows, slots) for rows in _steps(beds[0], size)]
    needs = [Capacity.of(plan) for plan in plans]
    capacity = Capacity(*map(max, zip(*needs, strict=True))).rounded()
    apart = Workspace(device)
    expected = []
    for plan in plans:
        ys = [y.clone() for y in before]
        staged = pack(plan).to(device)
        for bed, x, y in zip(beds, xs, ys, strict=True):
            launch_two(_split(y, bed.site), x, replace(bed.site, workspace=apart), staged)
        expected.append(ys)
    return Layer(
        beds=beds,
        xs=xs,
        ys=[y.clone() for y in before],
        before=before,
        plans=[pack(plan, capacity).to(device) for plan in plans],
        expected=expected,
    )


def _steps(bed: Bed, size: Size) -> list[list[int]]:
    """Return what the rows of each step ask for; a growing share of them is bare."""
    rng = np.random.default_rng(0)
    steps = []
    for number in range(size.plans):
        slots = np.array(random_slots(bed.layout, size.rows, seed=number))
        bare = rng.permutation(size.rows) < size.rows * number // max(size.plans - 1, 1)
        steps.append(np.where(bare, BASE_SLOT, slots).tolist())
    return steps


def _split(y: Tensor, site: Site) -> tuple[Tensor, ...]:
    return tuple(y.split(site.spec.slices, dim=1))


def check_replays(
    form: str, layer: Layer, size: Size, *, beside: Callable[[], None] | None = None
) -> Outcome:
    """Replay a graph and count the replays whose outputs have other bits than they should.

    Args:
        form: Of the kernels.
        layer: The sites and the steps.
        size: How often.
        beside: Called before every replay, to keep the device busy on another stream.
    """
    device = layer.xs[0].device
    if form == PDL and (reason := why_no_pdl(device)):
        return Outcome(left_out=reason)
    static = DevicePlan.empty(layer.plans[0].tile_rows, layer.plans[0].capacity, device)
    static.buffer.copy_(layer.plans[0].buffer)
    graph = Graph([_calls(form, layer, static)], device)
    if device.type == "cuda":
        for bed in layer.beds:
            bed.site.workspace.freeze()
    differs = torch.zeros(size.replays, dtype=torch.bool, device=device)
    for number in range(size.replays):
        step = number % len(layer.plans)
        if beside is not None:
            beside()
        static.buffer.copy_(layer.plans[step].buffer)
        for y, before in zip(layer.ys, layer.before, strict=True):
            y.copy_(before)
        graph.replay()
        for y, expected in zip(layer.ys, layer.expected[step], strict=True):
            differs[number] |= (y.view(BITS_OF[DTYPE]) != expected.view(BITS_OF[DTYPE])).any()
    if device.type == "cuda":
        # The other stream's memory is about to be given back.
        torch.cuda.synchronize(device)
    numbers = differs.nonzero().flatten().tolist()
    faults = [f"{len(numbers)} of {size.replays} differ, first {numbers[0]}"] if numbers else []
    if _control(layer, static).any():
        faults.append("control words are not at rest")
    return Outcome(float(len(numbers)), "; ".join(faults))


def _calls(form: str, layer: Layer, plan: DevicePlan) -> Callable[[], None]:
    """Return the launches of a layer."""

    def call() -> None:
        for bed, x, y in zip(layer.beds, layer.xs, layer.ys, strict=True):
            if form == ONE:
                launch(_split(y, bed.site), x, bed.site, plan)
            else:
                launch_two(_split(y, bed.site), x, bed.site, plan, pdl=form == PDL)

    return call


def _control(layer: Layer, plan: DevicePlan) -> Tensor:
    """Return the control words of the layer's workspace; asks for no more than is there."""
    return layer.beds[0].site.workspace.scratch(plan, slices=1, splits=1, dtype=DTYPE).control


def heavy_neighbour(device: torch.device) -> Callable[[], None]:
    """Return what queues a large product and a large copy on a stream of their own."""
    a = torch.randn(NEIGHBOUR_SIZE, NEIGHBOUR_SIZE, device=device).to(DTYPE)
    product = torch.empty_like(a)
    source = torch.zeros(NEIGHBOUR_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def queue() -> None:
        with torch.cuda.stream(stream):
            torch.mm(a, a, out=product)
            target.copy_(source)

    return queue

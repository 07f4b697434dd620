"""Time every way to compute the delta, and the base it is added to, at one site for one step.

What is timed is a CUDA graph in which a way runs once on each of several copies of its weights,
more of them together than the L2 holds; x, y and the plan stay where they are, as they would be
in L2 behind the layer before. The figure is the median over many replays, per copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from math import ceil
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from oneplusn.kernels.device_plan import DevicePlan, pack
from oneplusn.kernels.plan import Plan, SiteSpec, build_plan
from oneplusn.kernels.smoke import baselines, roofline
from oneplusn.kernels.smoke.cases import Bed, equal_shares, make_bed
from oneplusn.kernels.smoke.outcome import Outcome, error_of
from oneplusn.kernels.smoke.roofline import Case
from oneplusn.kernels.triton_backend import launch, launch_two
from oneplusn.kernels.tuning import Shape

Call = Callable[[], object]
Add = Callable[[Sequence[Tensor]], None]
"""Adds the delta to outputs, one per slice, or writes it there."""

CACHE_FACTOR = 3
"""The weights of all copies together are this many times what the L2 holds."""
MIN_COPIES, MAX_COPIES = 2, 128
REPLAY_US = 400.0
"""What a replay should take at least, beside which its own start does not count."""
REPLAYED_US = 15_000.0
"""What all replays together should take."""
MIN_REPLAYS, MAX_REPLAYS = 10, 100
EAGER_ROUNDS = 5
BESIDE_PROGRAMS = 64
"""Few, for they share the multiprocessors with the base."""
WARM_SECONDS = 0.05
LIBRARY = {
    roofline.LOOP: baselines.loop,
    roofline.GATHERED: baselines.gathered,
    roofline.GROUPED: baselines.grouped,
}


class Graph:
    """Calls that are replayed as one CUDA graph; without a GPU, called one after the other."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        """Capture the calls, after each was made once: nothing may be compiled or grow then."""
        # What the graph reads and writes must live as long as it does.
        self._calls = calls
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        for call in calls:
            call()
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()

    def replay(self) -> None:
        """Run the calls once more."""
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self._calls:
            call()


def replay_us(graph: Graph, device: torch.device) -> float:
    """Return the median time of a replay, in microseconds."""
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize(device)
    start = perf_counter()
    graph.replay()
    torch.cuda.synchronize(device)
    once = 1e6 * (perf_counter() - start)
    rounds = min(max(int(REPLAYED_US / once), MIN_REPLAYS), MAX_REPLAYS)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize(device)
    times: list[float] = [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]
    return median(times)


def eager_us(calls: Sequence[Call], device: torch.device) -> float:
    """Return the median time of a call, in microseconds, when Python launches each."""
    times = list[float]()
    for _ in range(EAGER_ROUNDS):
        torch.cuda.synchronize(device)
        start = perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize(device)
        times.append(1e6 * (perf_counter() - start) / len(calls))
    return median(times)


def warm_up(device: torch.device) -> None:
    """Keep a GPU busy until its clocks are up."""
    if device.type != "cuda":
        return
    x = torch.randn(4096, 4096, device=device).bfloat16()
    start = perf_counter()
    while perf_counter() - start < WARM_SECONDS:
        x @ x
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A step at one site: its rows lie as the plan sorts them.

    Attributes:
        case: What it stands for.
        bed: The experts.
        plan: The step on the host.
        staged: The step on the device.
        x: `[T, K]`.
        before: `[T, N]`, what the outputs hold before.
        delta: fp64 `[T, N]`, what is to be added.
    """

    case: Case
    bed: Bed
    plan: Plan
    staged: DevicePlan
    x: Tensor
    before: Tensor
    delta: Tensor

    @property
    def spec(self) -> SiteSpec:
        """The site."""
        return self.bed.site.spec

    @property
    def device(self) -> torch.device:
        """Where it all lies."""
        return self.x.device

    def ys(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the slices as views of `whole`."""
        return tuple(whole.split(self.spec.slices, dim=1))

    def num_copies(self, num_bytes: float) -> int:
        """Return how many copies of weights of this size do not fit the L2."""
        if self.device.type != "cuda":
            return MIN_COPIES
        wanted = int(-(-CACHE_FACTOR * roofline.CACHE_BYTES // num_bytes))
        return min(max(wanted, MIN_COPIES), MAX_COPIES)


@lru_cache(maxsize=1)
def make_step(spec: SiteSpec, case: Case, device: torch.device) -> Step:
    """Draw a step at a site; the last one is kept, since it is timed in many ways."""
    warm_up(device)
    bed = make_bed(spec, case.mix, dtype=torch.bfloat16, device=device)
    unsorted = build_plan(equal_shares(case.mix, case.rows), bed.layout.slots)
    row_slots = unsorted.slots.tolist()
    plan = build_plan(row_slots, bed.layout.slots, tile_rows=case.tile_rows)
    generator = torch.Generator(device).manual_seed(case.rows)
    shapes = (case.rows, spec.in_features), (case.rows, spec.out_features)
    x, before = (
        torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes
    )
    return Step(case, bed, plan, pack(plan).to(device), x, before, bed.delta(row_slots, x))


class Setup(NamedTuple):
    """A way, ready to run.

    Attributes:
        adds: The way on each copy of its weights.
        overwrites: Whether outputs are written, not added to.
        reason: Why there is none.
    """

    adds: Sequence[Add] = ()
    overwrites: bool = False
    reason: str = ""


def time_way(way: str, spec: SiteSpec, case: Case, device: torch.device) -> Outcome:
    """Check what a way computes, and time it."""
    eager = way in {roofline.EAGER_ONE, roofline.EAGER_TWO}
    if eager and device.type != "cuda":
        return Outcome(left_out="nothing to time without a GPU")
    step = make_step(spec, case, device)
    setup = set_up(way, step)
    if setup.reason:
        return Outcome(left_out=setup.reason)
    whole = step.before.clone()
    setup.adds[0](step.ys(whole))
    if way != roofline.BASE:
        expected = step.delta if setup.overwrites else step.before.double() + step.delta
        if fault := error_of(whole, expected, step.delta).fault(torch.bfloat16, device):
            return Outcome(fault=fault)
    calls = [partial(add, step.ys(whole)) for add in setup.adds]
    if device.type != "cuda":
        Graph(calls[1:], device).replay()
        return Outcome(note="not timed")
    if eager:
        return Outcome(eager_us(calls, device))
    calls *= ceil(REPLAY_US / (len(calls) * roofline.predict(way, spec, case)))
    return Outcome(replay_us(Graph(calls, device), device) / len(calls))


def set_up(way: str, step: Step) -> Setup:
    """Copy what a way reads until the L2 holds less than that."""
    if way in LIBRARY:
        return _library(way, step)
    if way == roofline.BASE:
        return Setup([partial(_base, step.x, weight) for weight in _base_weights(step)])
    if way == roofline.BESIDE:
        return _beside(step)
    if way == roofline.PDL and (reason := why_no_pdl(step.device)):
        return Setup(reason=reason)
    return Setup(our_adds(step, way))


def why_no_pdl(device: torch.device) -> str:
    """Return why launches cannot depend on one another there; nothing = they can."""
    if device.type != "cuda":
        return "not in the interpreter"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs sm_90"
    return ""


def our_adds(step: Step, way: str, shape: Shape | None = None) -> list[Add]:
    """Return our kernels in one of their forms, on each copy of the site."""
    rank_rows = roofline.load_of(step.case).rank_rows
    sites = step.bed.copies(step.num_copies(rank_rows * sum(roofline.rank_row_bytes(step.spec))))
    one = way in {roofline.ONE, roofline.EAGER_ONE}

    def add(ys: Sequence[Tensor], number: int) -> None:
        if one:
            launch(ys, step.x, sites[number], step.staged, shape=shape)
        else:
            pdl = way == roofline.PDL
            launch_two(ys, step.x, sites[number], step.staged, shape=shape, pdl=pdl)

    return [partial(add, number=number) for number in range(len(sites))]


def _base(x: Tensor, weight: Tensor, ys: Sequence[Tensor]) -> None:
    """Multiply with the base; its product is dropped."""
    linear(x, weight)


def _base_weights(step: Step) -> list[Tensor]:
    shape = step.spec.out_features, step.spec.in_features
    number = step.num_copies(roofline.ELEMENT * shape[0] * shape[1])
    generator = torch.Generator(step.device).manual_seed(0)
    weights = torch.empty(number, *shape, dtype=step.x.dtype, device=step.device)
    return list(weights.normal_(std=shape[1] ** -0.5, generator=generator))


def _library(way: str, step: Step) -> Setup:
    merged = baselines.merge(step.bed, step.plan.segments)
    number = step.num_copies(merged.num_bytes)
    batch = baselines.Sorted.of(step.x, step.plan.segments)
    if way == roofline.GROUPED and (reason := baselines.why_not_grouped(batch, merged)):
        return Setup(reason=reason)
    function = LIBRARY[way]
    copies = [merged, *(merged.copy() for _ in range(number - 1))]

    def add(ys: Sequence[Tensor], experts: baselines.Merged) -> None:
        function(ys, batch, experts)

    return Setup([partial(add, experts=experts) for experts in copies])


def _beside(step: Step) -> Setup:
    """Let the delta be computed on a side stream, apart from y, while the base is multiplied."""
    weights = _base_weights(step)
    sites = step.bed.copies(len(weights))
    cuda = step.device.type == "cuda"
    side = torch.cuda.Stream(step.device) if cuda else None

    def add(ys: Sequence[Tensor], number: int) -> None:
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side) if side is not None else nullcontext():
            programs = BESIDE_PROGRAMS if cuda else None
            launch(ys, step.x, sites[number], step.staged, into="delta", programs=programs)
        linear(step.x, weights[number])
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)

    return Setup([partial(add, number=number) for number in range(len(weights))], overwrites=True)

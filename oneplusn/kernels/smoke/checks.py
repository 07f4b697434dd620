"""Check the kernels at one site against fp64, against one another, and bit against bit.

All memory that a launch writes without being asked to is NaN before it, so that whoever reads
what another program has not written yet shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from oneplusn.kernels import reference, tuning
from oneplusn.kernels.device_plan import Capacity, DevicePlan, pack
from oneplusn.kernels.plan import BASE_SLOT, Plan, SiteSpec, build_plan
from oneplusn.kernels.smoke.cases import Bed, Mix, make_bed, random_slots
from oneplusn.kernels.smoke.outcome import Outcome, error_of
from oneplusn.kernels.smoke.timing import why_no_pdl
from oneplusn.kernels.triton_backend import gated_delta, launch, launch_two
from oneplusn.kernels.triton_plan import SlotTables, build_device_plan, scratch_size
from oneplusn.kernels.workspace import Scratch

Into = Literal["y", "delta"]

TWO = "two launches"
PDL = "two launches, PDL"
ONE = "one launch"
BITS = "any grid, any batch"
DELTA = "delta alone"
REFERENCE = "reference"
PLAN = "plan on the device"
FORMS = (TWO, PDL, ONE, BITS)
"""In this order: should the tickets hang, the two launches are known to be right or wrong."""
GRIDS = (1, 33, 132, 1024)
"""Programs: one does it all, they do not divide the work, one per multiprocessor, too many."""
INTERPRETED_GRIDS = (7,)
BITS_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Size(NamedTuple):
    """Rows of a step, and of its tiles."""

    rows: int
    tile_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A step, what its outputs hold before, and what is to be added to them in fp64."""

    row_slots: list[int]
    plan: Plan
    x: Tensor
    before: Tensor
    delta: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """A site, and steps of several sizes.

    Attributes:
        bed: The experts.
        trials: One step per size.
        first: Per trial, the bits that the first form of the kernels gave.
    """

    bed: Bed
    trials: Sequence[Trial]
    first: dict[int, Tensor] = field(default_factory=dict)


@lru_cache(maxsize=1)
def make_ground(
    spec: SiteSpec, mix: Mix, dtype: torch.dtype, sizes: tuple[Size, ...], device: torch.device
) -> Ground:
    """Draw a site and its steps; the last ones are kept, since several checks want them."""
    bed = make_bed(spec, mix, dtype=dtype, device=device)
    return Ground(bed, [make_trial(bed, size) for size in sizes])


def make_trial(bed: Bed, size: Size) -> Trial:
    """Draw a step; from eight rows on, some are bare."""
    device, dtype, spec = bed.a.device, bed.a.dtype, bed.site.spec
    row_slots = random_slots(bed.layout, size.rows, seed=size.rows)
    plan = build_plan(row_slots, bed.layout.slots, tile_rows=size.tile_rows)
    generator = torch.Generator(device).manual_seed(size.rows)
    shapes = (size.rows, spec.in_features), (size.rows, spec.out_features)
    x, before = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes
    )
    return Trial(row_slots, plan, x, before, bed.delta(row_slots, x))


Form = Callable[[Bed, Trial, Sequence[Tensor], DevicePlan], None]


def _one(bed: Bed, trial: Trial, ys: Sequence[Tensor], plan: DevicePlan) -> None:
    gated_delta(ys, trial.x, bed.site, trial.plan)


def _two(bed: Bed, trial: Trial, ys: Sequence[Tensor], plan: DevicePlan) -> None:
    launch_two(ys, trial.x, bed.site, plan)


def _two_pdl(bed: Bed, trial: Trial, ys: Sequence[Tensor], plan: DevicePlan) -> None:
    launch_two(ys, trial.x, bed.site, plan, pdl=True)


def _delta(bed: Bed, trial: Trial, ys: Sequence[Tensor], plan: DevicePlan) -> None:
    gated_delta(ys, trial.x, bed.site, trial.plan, into="delta")


def _reference(bed: Bed, trial: Trial, ys: Sequence[Tensor], plan: DevicePlan) -> None:
    reference.gated_delta(ys, trial.x, bed.site, trial.plan)


_FORMS: dict[str, Form] = {
    ONE: _one, TWO: _two, PDL: _two_pdl, DELTA: _delta, REFERENCE: _reference,
}  # fmt: skip


def check_form(form: str, ground: Ground) -> Outcome:
    """Compare a form with fp64, and with the bits of the forms before it, on all trials."""
    device, dtype = ground.bed.a.device, ground.bed.a.dtype
    if form == PDL and (reason := why_no_pdl(device)):
        return Outcome(left_out=reason)
    if form == BITS:
        return check_bits(ground)
    worst, faults = 0.0, list[str]()
    for number, trial in enumerate(ground.trials):
        whole, found = run(ground.bed, trial, _FORMS[form], into="delta" if form == DELTA else "y")
        expected = trial.delta if form == DELTA else trial.before.double() + trial.delta
        error = error_of(whole, expected, trial.delta)
        found += [fault] if (fault := error.fault(dtype, device)) else []
        if form in {ONE, TWO, PDL}:
            first = ground.first.setdefault(number, whole)
            found += [] if same_bits(whole, first) else ["other bits than the form before"]
        worst = max(worst, error.whole)
        faults += [f"{len(trial.x)} rows: {fault}" for fault in found]
    return Outcome(worst, "; ".join(faults))


def run(bed: Bed, trial: Trial, form: Form, *, into: Into = "y") -> tuple[Tensor, list[str]]:
    """Let a form compute; return the outputs, and what it did besides that it should not have."""
    plan = bed.site.workspace.stage(trial.plan)
    control = poison(bed, plan).control
    whole = trial.before.clone()
    if into == "delta":
        whole.fill_(torch.nan)
    form(bed, trial, whole.split(bed.site.spec.slices, dim=1), plan)
    bare = [row for row, slot in enumerate(trial.row_slots) if slot == BASE_SLOT]
    kept = torch.zeros_like(whole) if into == "delta" else trial.before
    faults = {
        "rows of the bare base changed": not same_bits(whole[bare], kept[bare]),
        "control words are not at rest": bool(control.any()),
    }
    return whole, [fault for fault, found in faults.items() if found]


def poison(bed: Bed, plan: DevicePlan) -> Scratch:
    """Fill what a launch of this plan works in with NaN; return it."""
    spec = bed.site.spec
    shape = tuning.shape_of(spec, plan.tile_rows, bed.a.device)
    scratch = bed.site.workspace.scratch(
        plan,
        slices=spec.num_slices,
        splits=shape.splits(spec.in_features),
        dtype=bed.a.dtype,
    )
    scratch.h.fill_(torch.nan)
    scratch.planes.fill_(torch.nan)
    return scratch


def check_bits(ground: Ground) -> Outcome:
    """Compare bits: of grids of any size, and of a row by itself."""
    bed, faults = ground.bed, list[str]()
    grids = GRIDS if bed.a.device.type == "cuda" else INTERPRETED_GRIDS
    for number, trial in enumerate(ground.trials):
        if number not in ground.first:
            ground.first[number], _ = run(bed, trial, _one)
        first = ground.first[number]
        for programs in grids:
            whole, found = run(bed, trial, _on_grid(programs))
            found += [] if same_bits(whole, first) else ["other bits"]
            faults += [f"{len(trial.x)} rows, {programs} programs: {fault}" for fault in found]
        plan = build_plan(trial.row_slots[:1], bed.layout.slots, tile_rows=trial.plan.max_tile_rows)
        alone = Trial(trial.row_slots[:1], plan, trial.x[:1], trial.before[:1], trial.delta[:1])
        if not same_bits(run(bed, alone, _one)[0], first[:1]):
            faults.append(f"{len(trial.x)} rows: the first has other bits when it is alone")
    return Outcome(float(len(faults)), "; ".join(faults))


def _on_grid(programs: int) -> Form:
    def form(bed: Bed, trial: Trial, ys: Sequence[Tensor], plan: DevicePlan) -> None:
        launch(ys, trial.x, bed.site, plan, programs=programs)

    return form


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Compare bit by bit, NaN included."""
    bits = BITS_OF[actual.dtype]
    return torch.equal(actual.view(bits), expected.view(bits))


def check_plan(ground: Ground) -> Outcome:
    """Compare the plans made on the device with those made on the host, entry by entry."""
    device, layout = ground.bed.a.device, ground.bed.layout
    tables = SlotTables(1 + max(layout.slots), len(layout.ranks), device)
    tables.write(layout.slots)
    faults = list[str]()
    for trial in ground.trials:
        expected = pack(trial.plan)
        rows = torch.tensor(trial.row_slots, dtype=torch.int32, device=device)
        scratch = torch.empty(scratch_size(len(rows)), dtype=torch.int32, device=device)
        plan = DevicePlan.empty(expected.tile_rows, expected.capacity, device)
        build_device_plan(rows, tables, plan, scratch)
        need = Capacity.of(trial.plan)
        named = {"counts": 4, "rows": need.rows, "slots": need.rows, **need._asdict()}
        faults += [
            f"{len(rows)} rows: {name} differ"
            for name, size in named.items()
            if not torch.equal(getattr(plan, name)[:size].cpu(), getattr(expected, name)[:size])
        ]
    return Outcome(float(len(faults)), "; ".join(faults))

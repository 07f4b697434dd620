"""Compile the kernels in the forms that checks and timings launch, by launches that do nothing.

What is compiled is found again on disk by the processes that come later. Compilation keeps one
core busy and holds Python's lock, so it is divided among processes, not threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from oneplusn.kernels.cpu import SlabCache
from oneplusn.kernels.device_plan import Capacity, DevicePlan
from oneplusn.kernels.native import Arguments
from oneplusn.kernels.plan import PAGE, Site, SiteSpec, SiteTable, build_plan
from oneplusn.kernels.smoke.checks import DELTA, PDL, TWO, Size
from oneplusn.kernels.smoke.outcome import Outcome
from oneplusn.kernels.smoke.timing import why_no_pdl
from oneplusn.kernels.triton_backend import launch, launch_two
from oneplusn.kernels.triton_plan import SlotTables, build_device_plan, scratch_size
from oneplusn.kernels.tuning import Shape
from oneplusn.kernels.workspace import Workspace


class Variant(NamedTuple):
    """What decides which code a launch compiles.

    Attributes:
        form: Of the kernels.
        spec: The site.
        tile_rows: Rows of the plan's tiles.
        dtype: Of the experts.
        shape: Block shapes, if others than those of `tuning`.
    """

    form: str
    spec: SiteSpec
    tile_rows: int
    dtype: torch.dtype = torch.bfloat16
    shape: Shape | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.form}, tiles of {self.tile_rows} rows, {name}"


def compile_variant(variant: Variant, device: torch.device) -> Outcome:
    """Launch one variant on a plan without tiles: its programs find nothing to do, and end."""
    form, spec, tile_rows, dtype, shape = variant
    if form == PDL and (reason := why_no_pdl(device)):
        return Outcome(left_out=reason)
    a = torch.zeros(1, spec.num_slices, PAGE, spec.in_features, dtype=dtype, device=device)
    b = torch.zeros(1, PAGE, spec.out_features, dtype=dtype, device=device)
    table = SiteTable(runs=1, slots=1, gates=PAGE, device=device)
    site = Site(spec, a, b, table, SlabCache(0), Arguments(), Workspace(device))
    plan = DevicePlan.empty(tile_rows, Capacity(*[PAGE] * len(Capacity._fields)), device)
    plan.buffer.zero_()
    x = torch.zeros(tile_rows, spec.in_features, dtype=dtype, device=device)
    whole = torch.zeros(tile_rows, spec.out_features, dtype=dtype, device=device)
    ys = whole.split(spec.slices, dim=1)
    try:
        if form in {TWO, PDL}:
            launch_two(ys, x, site, plan, shape=shape, pdl=form == PDL)
        else:
            launch(ys, x, site, plan, shape=shape, into="delta" if form == DELTA else "y")
    except OutOfResources as error:
        # Of shapes that are only tried, some may not fit.
        return Outcome(left_out=str(error)) if shape else Outcome(fault=str(error))
    return _finished(device)


def compile_plan(size: Size, device: torch.device) -> Outcome:
    """Launch the kernels that make a plan on rows of the bare base."""
    rows = torch.zeros(size.rows, dtype=torch.int32, device=device)
    plan = build_plan(rows.tolist(), {}, tile_rows=size.tile_rows)
    out = DevicePlan.empty(size.tile_rows, Capacity.of(plan).rounded(), device)
    scratch = torch.empty(scratch_size(size.rows), dtype=torch.int32, device=device)
    build_device_plan(rows, SlotTables(1, 1, device), out, scratch)
    return _finished(device)


def _finished(device: torch.device) -> Outcome:
    """Wait, so that an error shows here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Outcome()

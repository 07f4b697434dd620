"""The delta on a GPU: what the Triton kernels are launched with.

One launch per site. On the CPU the same code runs in Triton's interpreter, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import triton
from torch import Tensor

from oneplusn.kernels import tuning
from oneplusn.kernels.device_plan import DevicePlan
from oneplusn.kernels.plan import Plan, Site
from oneplusn.kernels.triton_delta import delta_kernel, expand_kernel, shrink_kernel
from oneplusn.kernels.tuning import Shape

MAX_SLICES = 3
"""Outputs of a site; the kernels have so many pointers."""


def gated_delta(
    ys: Sequence[Tensor],
    x: Tensor,
    site: Site,
    plan: Plan,
    *,
    into: Literal["y", "delta"] = "y",
) -> None:
    """Compute each adapted row's delta in one launch; see `ops.gated_delta`.

    Semantics:
        As the op. H = gate * (A x) is summed in fp32 and rounded once to the dtype of x; y + H B
        is summed in fp32 in the order of the tile's runs, and rounded once. Equal rows give equal
        bits in any batch with the same `max_tile_rows`.
    """
    if not plan.num_rows or (plan.empty and into == "y"):
        return
    launch(ys, x, site, site.workspace.stage(plan), into=into)


class _Launch(NamedTuple):
    """What both forms of a launch pass on, in the order of the kernels' arguments."""

    ys: tuple[Tensor, Tensor, Tensor]
    widths: tuple[int, int, int]
    strides: tuple[int, int, int]
    splits: int
    even_k: bool
    num_shrinks: int
    num_expands: int


def launch(
    ys: Sequence[Tensor],
    x: Tensor,
    site: Site,
    plan: DevicePlan,
    *,
    into: Literal["y", "delta"] = "y",
    shape: Shape | None = None,
    programs: int | None = None,
) -> None:
    """Launch `delta_kernel` on a plan that is on the device.

    Args:
        ys: As in `gated_delta`; the columns of every output lie side by side.
        x: `[T, K]`, the columns side by side.
        site: The resident experts.
        plan: The step's grouping.
        into: Whether outputs are added to, or overwritten.
        shape: Block shapes, by default those of `tuning`.
        programs: How many there are to draw tickets, by default as many as fit the device.
    """
    shape = shape or tuning.shape_of(site.spec, plan.tile_rows, x.device)
    args = _arguments(ys, x, site, plan, shape)
    h, planes, control = site.workspace.scratch(
        plan, slices=len(ys), splits=args.splits, dtype=x.dtype
    )
    programs = programs or tuning.programs(shape, x.device)
    table = site.table
    delta_kernel[(min(programs, args.num_shrinks + args.num_expands),)](
        x, site.a, site.b, *args.ys, h, planes, control,
        *_sections(plan), table.run_first, table.run_rows, table.gate_first, table.gates,
        site.spec.in_features, *args.widths, x.stride(0), *args.strides,
        plan.capacity.tiles, plan.capacity.chunks,
        S=len(ys), SPLITS=args.splits, SPLIT_K=shape.split_k, EVEN_K=args.even_k,
        BM=plan.tile_rows, BN=shape.block_n, BK=shape.block_k, ADD=into == "y",
        num_warps=shape.num_warps, num_stages=shape.num_stages, maxnreg=shape.max_registers,
    )  # fmt: skip


def launch_two(
    ys: Sequence[Tensor],
    x: Tensor,
    site: Site,
    plan: DevicePlan,
    *,
    into: Literal["y", "delta"] = "y",
    shape: Shape | None = None,
    pdl: bool = False,
) -> None:
    """Compute the same as `launch` in two launches, bit for bit: what one must beat.

    With `pdl` (programmatic dependent launch, sm_90), the second begins beside the first.
    """
    shape = shape or tuning.shape_of(site.spec, plan.tile_rows, x.device)
    args = _arguments(ys, x, site, plan, shape)
    h, planes, control = site.workspace.scratch(
        plan, slices=len(ys), splits=args.splits, dtype=x.dtype
    )
    table = site.table
    common = {"num_warps": shape.num_warps, "num_stages": shape.num_stages, "launch_pdl": pdl}
    shrink_kernel[(max(1, args.num_shrinks),)](
        x, site.a, h, planes, control,
        *_sections(plan), table.run_first, table.run_rows, table.gate_first, table.gates,
        site.spec.in_features, x.stride(0), plan.capacity.tiles, plan.capacity.chunks,
        S=len(ys), SPLITS=args.splits, SPLIT_K=shape.split_k, EVEN_K=args.even_k,
        BM=plan.tile_rows, BK=shape.block_k, PDL=pdl, **common,
    )  # fmt: skip
    expand_kernel[(args.num_expands,)](
        site.b, *args.ys, h,
        plan.counts, plan.rows, plan.tiles, plan.places, table.run_first, table.run_rows,
        *args.widths, *args.strides, plan.capacity.chunks,
        S=len(ys), BM=plan.tile_rows, BN=shape.block_n, ADD=into == "y", PDL=pdl, **common,
    )  # fmt: skip


def _sections(plan: DevicePlan) -> tuple[Tensor, ...]:
    tables = (plan.rows, plan.slots, plan.tiles, plan.chunks, plan.places, plan.ks)
    return plan.counts, *tables


def _arguments(
    ys: Sequence[Tensor], x: Tensor, site: Site, plan: DevicePlan, shape: Shape
) -> _Launch:
    assert len(ys) <= MAX_SLICES, f"{site.spec.name} has {len(ys)} slices"
    assert all(tensor.stride(1) == 1 for tensor in (x, *ys)), "columns must lie side by side"
    missing = MAX_SLICES - len(ys)
    splits = shape.splits(site.spec.in_features)
    blocks = sum(triton.cdiv(width, shape.block_n) for width in site.spec.slices)
    y0, y1, y2 = (*ys, *[ys[0]] * missing)
    n0, n1, n2 = (*site.spec.slices, *[0] * missing)
    return _Launch(
        ys=(y0, y1, y2),
        widths=(n0, n1, n2),
        strides=(y0.stride(0), y1.stride(0), y2.stride(0)),
        splits=splits,
        even_k=shape.even(site.spec.in_features),
        num_shrinks=plan.capacity.chunks * len(ys) * splits,
        num_expands=plan.capacity.tiles * blocks,
    )

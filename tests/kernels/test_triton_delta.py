"""What the one-launch kernel promises beyond the formula: bits, rest states, any grid.

Without a GPU this is Triton's interpreter, which runs one program after the other: it shows the
arithmetic and the bookkeeping. Orders among programs are the ticket model's (test_tickets.py).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_batches import (
    FULL_PAGES,
    NO_OWN,
    PLAIN,
    SHARED_PAGE,
    Batch,
    batches,
    check,
    equal_bits,
    fixed_batch,
    outputs,
)
from oneplusn.kernels import triton_backend
from oneplusn.kernels.device_plan import DevicePlan
from oneplusn.kernels.plan import BASE_SLOT, build_plan
from oneplusn.kernels.tuning import Shape
from site_builder import Cluster
from tolerances import assert_delta_close

# Columns and parts of K that divide the widths of the sites below, and that do not.
SHAPES = {
    "one block, one part": Shape(64, 32, 64, num_warps=4, num_stages=3, programs=1),
    "several blocks and parts": Shape(16, 16, 16, num_warps=4, num_stages=3, programs=1),
    "parts of two turns": Shape(32, 16, 32, num_warps=4, num_stages=3, programs=1),
}
ONE_BLOCK = SHAPES["one block, one part"]
SEVERAL = SHAPES["several blocks and parts"]


def deltas(
    batch: Batch,
    shape: Shape = SEVERAL,
    *,
    programs: int = 3,
    tile_rows: int = 16,
    form: str = "one launch",
) -> torch.Tensor:
    """Compute deltas `[T, N]` in memory full of NaN; check that the control words are at rest."""
    world, dtype = batch.world, batch.x.dtype
    plan = stage(batch, tile_rows)
    workspace = world.site.workspace
    scratch = workspace.scratch(plan, slices=world.site.spec.num_slices, splits=8, dtype=dtype)
    scratch.h.fill_(torch.nan)
    scratch.planes.fill_(torch.nan)
    whole, ys = outputs(world, len(batch.x), dtype)
    whole[:, 1:] = torch.nan
    if form == "one launch":
        triton_backend.launch(
            ys, batch.x, world.site, plan, into="delta", shape=shape, programs=programs
        )
    else:
        triton_backend.launch_two(ys, batch.x, world.site, plan, into="delta", shape=shape)
    assert not scratch.control.any()
    return whole[:, 1:]


def stage(batch: Batch, tile_rows: int) -> DevicePlan:
    plan = build_plan(batch.row_slots, batch.world.slots, tile_rows=tile_rows)
    return batch.world.site.workspace.stage(plan)


def mixed(dtype: torch.dtype = torch.float32) -> Batch:
    """Five tasks of three clusters, a blend, the base; runs of 1 to 5 pages, one chunk and two."""
    return fixed_batch(
        [FULL_PAGES, SHARED_PAGE, Cluster((), ((64, 9),))],
        [2, 1, 8, 0, 7, 1, 3, 0, 4, 7, 6, 2],
        dtype,
        blends=[[(0, 0.5), (2, -1.5), (6, 0.25)]],
    )


@settings(max_examples=12)
@given(batches(torch.float32, max_rows=24))
def test_one_launch_is_the_formula_in_fp32(batch: Batch) -> None:
    check(triton_backend.gated_delta, batch, torch.float32)


@settings(max_examples=6)
@given(batches(torch.bfloat16))
def test_one_launch_is_the_formula_in_bf16(batch: Batch) -> None:
    check(triton_backend.gated_delta, batch, torch.bfloat16)


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_any_number_of_programs_and_both_forms_give_equal_bits(
    shape: Shape, tile_rows: int
) -> None:
    batch = mixed()
    one = deltas(batch, shape, programs=1, tile_rows=tile_rows)
    assert equal_bits(deltas(batch, shape, programs=7, tile_rows=tile_rows), one)
    assert equal_bits(deltas(batch, shape, programs=64, tile_rows=tile_rows), one)
    assert equal_bits(deltas(batch, shape, tile_rows=tile_rows, form="two launches"), one)


def test_launches_in_a_row_with_other_plans_are_each_right() -> None:
    """The second finds the first one's rank rows, planes and control words."""
    batch = mixed()
    again = Batch(batch.world, batch.row_slots[::-1], batch.x.flip(0))
    first, second = deltas(batch), deltas(again)
    assert_delta_close(first, batch.delta, torch.float32)
    assert equal_bits(second, first.flip(0))


@settings(max_examples=3)
@given(st.permutations(range(12)))
def test_permuting_the_rows_permutes_the_outputs_bit_for_bit(order: list[int]) -> None:
    batch = mixed(torch.bfloat16)
    moved = Batch(batch.world, [batch.row_slots[row] for row in order], batch.x[order])
    assert equal_bits(deltas(moved, ONE_BLOCK), deltas(batch, ONE_BLOCK)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_row_has_the_bits_that_it_has_alone(dtype: torch.dtype) -> None:
    """Whoever shares its tile, its cluster or its batch."""
    batch = mixed(dtype)
    together = deltas(batch, ONE_BLOCK)
    for row in (0, 1, 2, 4, 6):
        alone = Batch(batch.world, [batch.row_slots[row]], batch.x[row : row + 1])
        assert equal_bits(deltas(alone, ONE_BLOCK), together[row : row + 1])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_values_that_are_not_finite_stay_in_their_row() -> None:
    batch = mixed()
    clean = deltas(batch, ONE_BLOCK)
    batch.x[0] = torch.inf
    batch.x[3] = torch.nan  # a bare row
    spoilt = deltas(batch, ONE_BLOCK)

    assert not spoilt[0].isfinite().any()
    assert equal_bits(spoilt[1:], clean[1:])


@pytest.mark.parametrize(
    "row_slots", [[BASE_SLOT] * 3, [BASE_SLOT] * 20], ids=["one tile", "two tiles"]
)
def test_a_batch_of_bare_rows_is_zero(row_slots: list[int]) -> None:
    assert not deltas(fixed_batch([PLAIN], row_slots, torch.float32), ONE_BLOCK).any()


def test_an_empty_batch_launches_nothing() -> None:
    batch = fixed_batch([NO_OWN], [], torch.float32, slices=(16,))
    y = torch.zeros(0, 16)
    plan = build_plan([], batch.world.slots)
    triton_backend.gated_delta([y], batch.x, batch.world.site, plan, into="delta")

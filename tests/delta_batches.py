"""Batches over random sites, and what every backend must make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import note
from hypothesis import strategies as st

from oneplusn.kernels.ops import GatedDelta
from oneplusn.kernels.plan import BASE_SLOT, build_plan
from site_builder import Cluster, World, build_world
from tolerances import assert_delta_close

rank = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 8, 16]), st.integers(0, 64))
ranks = st.lists(rank, max_size=3).map(tuple)
clusters = st.lists(
    st.builds(Cluster, common=ranks, own=st.lists(ranks, min_size=1, max_size=3).map(tuple)),
    min_size=1,
    max_size=4,
)
widths = st.lists(st.integers(8, 40), min_size=1, max_size=3).map(tuple)


@dataclass(frozen=True, repr=False)
class Batch:
    """A site, and what the rows of a step ask for."""

    world: World
    row_slots: Sequence[int]
    x: torch.Tensor

    @property
    def delta(self) -> torch.Tensor:
        return self.world.delta(self.row_slots, self.x)


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype, *, max_rows: int = 70) -> Batch:
    shape = draw(clusters)
    num_tasks = sum(len(cluster.own) for cluster in shape)
    weighted = st.tuples(st.integers(0, num_tasks - 1), st.sampled_from([0.25, 0.75, -0.5]))
    blend = st.lists(weighted, min_size=2, max_size=4, unique_by=lambda pair: pair[0])
    world = build_world(
        shape,
        in_features=draw(st.sampled_from([8, 24, 40])),
        slices=(draw(widths),),
        dtype=dtype,
        blends=draw(st.lists(blend, max_size=2)) if num_tasks > 1 else (),
        partial=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    num_rows = draw(st.integers(1, max_rows))
    slot = st.sampled_from([BASE_SLOT, *world.slots])
    row_slots = draw(st.lists(slot, min_size=num_rows, max_size=num_rows))
    note(f"{shape}, slices {world.site.spec.slices}, rows {row_slots}, slots {world.slots}")
    return Batch(world, row_slots, random_rows(num_rows, world, dtype))


def random_rows(num_rows: int, world: World, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, world.site.spec.in_features, generator=generator).to(dtype)


def outputs(
    world: World, num_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Make outputs of a site as views with strides of one buffer, in which a column is left."""
    generator = torch.Generator().manual_seed(num_rows)
    whole = torch.randn(num_rows, 1 + world.site.spec.out_features, generator=generator).to(dtype)
    return whole, list(whole[:, 1:].split(world.site.spec.slices, dim=1))


def check(gated_delta: GatedDelta, batch: Batch, dtype: torch.dtype) -> None:
    """Check both forms of output, and that nothing changes which should not."""
    world, plan = batch.world, build_plan(batch.row_slots, batch.world.slots)
    expected = batch.delta
    bare = [row for row, slot in enumerate(batch.row_slots) if slot == BASE_SLOT]

    whole, ys = outputs(world, plan.num_rows, dtype)
    before = whole.clone()
    gated_delta(ys, batch.x, world.site, plan)
    assert_delta_close(whole[:, 1:], before[:, 1:].double() + expected, dtype)
    assert equal_bits(whole[:, 0], before[:, 0])
    assert equal_bits(whole[bare], before[bare])

    whole, ys = outputs(world, plan.num_rows, dtype)
    whole[:, 1:] = torch.nan
    gated_delta(ys, batch.x, world.site, plan, into="delta")
    assert_delta_close(whole[:, 1:], expected, dtype)
    assert not whole[bare, 1:].any()


def equal_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[actual.dtype]
    return torch.equal(actual.view(bits), expected.view(bits))


FULL_PAGES = Cluster(common=(16, 16), own=((16,), (32,)))
SHARED_PAGE = Cluster(common=(4, 4, 4, 4), own=((4,), (4,), (4,), (4,)))
PLAIN = Cluster(common=(), own=((64,),))
NO_OWN = Cluster(common=(5, 0, 1), own=((), ()))


def fixed_batch(
    shape: Sequence[Cluster],
    row_slots: Sequence[int],
    dtype: torch.dtype,
    *,
    slices: Sequence[int] = (48, 16, 16),
    blends: Sequence[Sequence[tuple[int, float]]] = (),
) -> Batch:
    world = build_world(shape, slices=(slices,), dtype=dtype, blends=blends)
    return Batch(world, row_slots, random_rows(len(row_slots), world, dtype))

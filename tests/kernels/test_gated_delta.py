"""Both backends against the formula, computed from merged weights: no pages, runs or plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from oneplusn.kernels import cpu, reference
from oneplusn.kernels.ops import GatedDelta
from oneplusn.kernels.plan import BASE_SLOT, MAX_RUNS, build_plan
from site_builder import Cluster, World, build_world
from tolerances import assert_close, assert_delta_close

# How the CPU backend is made to go: by its own choice, always with a mask, always run by run.
CHOICE, MASK, RUNS = cpu.CALL_MACS, 2**60, -1

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "backend", [reference.gated_delta, cpu.gated_delta], ids=["reference", "cpu"]
)
@pytest.mark.parametrize(
    ("shape", "row_slots"),
    [
        pytest.param([FULL_PAGES], [1], id="one row"),
        pytest.param([FULL_PAGES], [0, 0], id="base only"),
        pytest.param([FULL_PAGES, PLAIN], [3, 2, 0, 1, 2], id="two clusters and the base"),
        pytest.param([SHARED_PAGE, SHARED_PAGE], list(range(1, 9)), id="experts share pages"),
        pytest.param([NO_OWN, PLAIN], [1, 3, 2, 1], id="tasks without own expert"),
        pytest.param([FULL_PAGES, SHARED_PAGE], [7, 1, 7, 3], id="a blend over two clusters"),
    ],
)
def test_delta_of(
    shape: Sequence[Cluster], row_slots: Sequence[int], backend: GatedDelta, dtype: torch.dtype
) -> None:
    blends = [[(0, 0.5), (2, -1.5), (3, 0.25)]] if max(row_slots) == 7 else []
    check(backend, fixed_batch(shape, row_slots, dtype, blends=blends), dtype)


@pytest.mark.parametrize("backend", [reference.gated_delta, cpu.gated_delta])
def test_a_blend_may_use_as_many_runs_as_a_table_has_columns(backend: GatedDelta) -> None:
    tasks = MAX_RUNS // 2
    shape = [Cluster(common=(2,), own=((1 + task,),)) for task in range(tasks)]
    blend = [(task, 0.5 - task) for task in range(tasks)]
    batch = fixed_batch(shape, [tasks + 1, 1, 0, tasks + 1], torch.float32, blends=[blend])

    assert len(batch.world.slots[tasks + 1].runs) == MAX_RUNS
    check(backend, batch, torch.float32)


@settings(max_examples=40)
@given(batches(torch.float32, max_rows=24))
def test_reference_is_the_formula(batch: Batch) -> None:
    check(reference.gated_delta, batch, torch.float32)


@pytest.mark.parametrize("way", [CHOICE, MASK, RUNS], ids=["choice", "mask", "runs"])
@settings(max_examples=60)
@given(batch=batches(torch.float32))
def test_cpu_is_the_formula_in_fp32(way: int, batch: Batch) -> None:
    with mock.patch.object(cpu, "CALL_MACS", way):
        check(cpu.gated_delta, batch, torch.float32)


@pytest.mark.parametrize("reorder_after", [0, cpu.REORDER_AFTER], ids=["reordered", "plain"])
@settings(max_examples=60)
@given(batch=batches(torch.bfloat16))
def test_cpu_is_the_formula_in_bf16(reorder_after: int, batch: Batch) -> None:
    with mock.patch.object(cpu, "REORDER_AFTER", reorder_after):
        check(cpu.gated_delta, batch, torch.bfloat16)


PREFILLS = {
    "one task, all rows": [1] * 80,
    "one task between bare rows": [0] * 3 + [1] * 64 + [0] * 2,
    "two prompts of a task apart": [1] * 40 + [3] * 5 + [1] * 40,
    "one long and many short": [2, 3, 1, 4, 0] + [3] * 70 + [1, 2],
    "one long and decode rows of the same task": [1, 2, 1] + [1] * 64,
    "many of one cluster": [1, 2] * 50 + [3] * 65,
    "a long blend": [5] * 66 + [1, 5, 2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", [CHOICE, MASK, RUNS], ids=["choice", "mask", "runs"])
@pytest.mark.parametrize("row_slots", PREFILLS.values(), ids=PREFILLS.keys())
def test_cpu_with_many_rows_of_a_task(
    row_slots: Sequence[int], way: int, dtype: torch.dtype
) -> None:
    shape = [Cluster((4, 12, 3), ((17,), (4,))), PLAIN, NO_OWN]
    batch = fixed_batch(shape, row_slots, dtype, blends=[[(0, 0.5), (2, 0.5), (3, -1.0)]])
    row_slots = [6 if slot == 5 else slot for slot in row_slots]
    with mock.patch.object(cpu, "CALL_MACS", way):
        check(cpu.gated_delta, Batch(batch.world, row_slots, batch.x), dtype)


@settings(max_examples=30)
@given(batch=batches(torch.float32, max_rows=40), data=st.data())
def test_permuting_the_rows_permutes_the_outputs(batch: Batch, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(batch.row_slots))))
    moved = Batch(batch.world, [batch.row_slots[row] for row in order], batch.x[order])

    deltas = []
    for some in (batch, moved):
        _, ys = outputs(some.world, len(order), torch.float32)
        plan = build_plan(some.row_slots, some.world.slots)
        cpu.gated_delta(ys, some.x, some.world.site, plan, into="delta")
        deltas.append(torch.cat(ys, dim=1))
    assert_close(deltas[1], deltas[0][order])


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    batch = fixed_batch([FULL_PAGES, PLAIN], [1, 2, 3, 0, 1], torch.float32)
    batch.x[3] = torch.inf
    batch.x[4] = torch.nan
    _, ys = outputs(batch.world, 5, torch.float32)
    plan = build_plan(batch.row_slots, batch.world.slots)

    cpu.gated_delta(ys, batch.x, batch.world.site, plan, into="delta")
    delta = torch.cat(ys, dim=1)

    assert_delta_close(delta[:3], batch.delta[:3], torch.float32)
    assert not delta[3].any()
    assert delta[4].isnan().all()

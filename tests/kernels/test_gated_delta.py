"""Every backend against the formula, computed from merged weights: no pages, runs or plans."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

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
    fixed_batch,
    outputs,
)
from oneplusn.kernels import cpu, cpu_native, reference, triton_backend
from oneplusn.kernels.ops import GatedDelta
from oneplusn.kernels.plan import MAX_RUNS, build_plan
from site_builder import Cluster
from tolerances import assert_close, assert_delta_close

BACKENDS: dict[str, GatedDelta] = {
    "reference": reference.gated_delta,
    "slabs": cpu.gated_delta,
    "native": cpu_native.gated_delta,
    "triton": triton_backend.gated_delta,
}
# How the CPU backend is made to go: by its own choice, always with a mask, always run by run.
CHOICE, MASK, RUNS = cpu.CALL_MACS, 2**60, -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
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


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
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


@pytest.mark.parametrize("backend", [cpu.gated_delta, cpu_native.gated_delta])
def test_values_that_are_not_finite_stay_in_their_row(backend: GatedDelta) -> None:
    batch = fixed_batch([FULL_PAGES, PLAIN], [1, 2, 3, 0, 1], torch.float32)
    batch.x[3] = torch.inf
    batch.x[4] = torch.nan
    _, ys = outputs(batch.world, 5, torch.float32)
    plan = build_plan(batch.row_slots, batch.world.slots)

    backend(ys, batch.x, batch.world.site, plan, into="delta")
    delta = torch.cat(ys, dim=1)

    assert_delta_close(delta[:3], batch.delta[:3], torch.float32)
    assert not delta[3].any()
    assert delta[4].isnan().all()

"""What the CPU packs: when it is made, when it is kept, and that it is never another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from oneplusn.kernels import cpu, cpu_step
from oneplusn.kernels.plan import PAGE, SlotInfo, build_plan
from site_builder import Cluster, World, build_world
from tolerances import assert_delta_close

SHAPE = [Cluster((4, 4), ((8,), (8,), (2,))), Cluster((), ((20,),))]


def step(
    world: World,
    row_slots: Sequence[int],
    *,
    sites: Sequence[int] = (0,),
    slots: dict[int, SlotInfo] | None = None,
) -> list[torch.Tensor]:
    """Take one step over some of the sites; check and return their deltas."""
    plan = build_plan(row_slots, slots or world.slots)
    deltas = []
    for index in sites:
        site = world.sites[index]
        x = torch.randn(len(row_slots), site.spec.in_features).to(site.a.dtype)
        delta = torch.empty(len(row_slots), site.spec.out_features, dtype=site.a.dtype)
        ys = delta.split(site.spec.slices, dim=1)
        cpu.gated_delta(ys, x, site, plan, into="delta")
        assert_delta_close(delta, world.delta(row_slots, x, site=index), site.a.dtype)
        deltas.append(delta)
    return deltas


@pytest.mark.parametrize(
    ("batch", "builds"),
    [
        pytest.param([1, 2, 4], 1, id="same batch"),
        pytest.param([4, 1, 2], 1, id="other order"),
        pytest.param([1, 0, 1, 2, 4, 0], 1, id="other rows"),
        pytest.param([1, 2], 1, id="a task left"),
        pytest.param([1, 2, 3, 4], 2, id="a task came"),
        pytest.param([3], 2, id="another task"),
        pytest.param([0, 0], 1, id="base only"),
    ],
)
def test_a_slab_is_packed_when_a_run_is_missing(batch: list[int], builds: int) -> None:
    world = build_world(SHAPE)
    step(world, [1, 2, 4])
    step(world, batch)

    assert world.site.slabs.builds == builds


def test_a_slab_is_packed_anew_when_most_of_it_lies_idle() -> None:
    world = build_world([Cluster((), ((4,), (4,), (1,)))])
    step(world, [1, 2, 3])
    step(world, [1, 3])
    assert world.site.slabs.builds == 1
    step(world, [3])
    assert world.site.slabs.builds == 2


def test_a_slab_serves_its_content_after_its_pages_have_moved() -> None:
    world = build_world(SHAPE)
    step(world, [1, 4])
    site, last = world.site, len(world.site.a) - 1
    moved = int(site.table.run_first[1])
    for array in (site.a, site.b):
        array[last] = array[moved]
        array[moved] = torch.nan
    site.table.set_run(1, last, int(site.table.run_rows[1]))

    step(world, [1, 4])
    step(world, [4, 1])
    assert site.slabs.builds == 1
    step(world, [1, 2, 3, 4])
    assert site.slabs.builds == 2


@pytest.mark.parametrize(
    "same_key", [False, True], ids=["another task", "same task, other version"]
)
def test_a_run_id_used_again_brings_up_the_new_content(*, same_key: bool) -> None:
    old = build_world([Cluster((4, 4), ((8,), (8,)), digest="sha256:old")], seed=1)
    new = build_world([Cluster((4, 4), ((8,), (8,)), digest="sha256:new")], seed=2)
    new.sites[0] = replace(new.site, spec=old.site.spec, slabs=old.site.slabs)
    slots = {
        slot: replace(info, key=old.slots[slot].key) if same_key else info
        for slot, info in new.slots.items()
    }
    assert [i.runs for i in old.slots.values()] == [i.runs for i in slots.values()]

    for world, its_slots in ((old, old.slots), (new, slots), (old, old.slots)):
        step(world, [1, 2, 1], slots=its_slots)


def test_gates_follow_a_slot_that_is_used_again() -> None:
    world = build_world(SHAPE, blends=[[(0, 0.5), (1, 0.5)]])
    step(world, [5, 1])
    # The blend leaves; another over the same runs takes its slot.
    other = build_world(SHAPE, blends=[[(0, 2.0), (1, -1.0)]])
    other.sites[0] = replace(other.site, spec=world.site.spec, slabs=world.site.slabs)
    step(other, [5, 1])

    assert world.site.slabs.builds == 1


THREE_SITES = ((16,), (16, 8), (40,))


def sizes_of_slabs() -> list[int]:
    """Return the bytes of the three sites' slabs for the batch of the tests below."""
    sizes = []
    for index in range(3):
        world = build_world(SHAPE, slices=THREE_SITES)
        step(world, [1, 2, 4], sites=[index])
        sizes.append(world.site.slabs.num_bytes)
    return sizes


@pytest.mark.parametrize("held", [0, 1, 2, 3])
def test_slabs_stay_within_the_budget_and_those_that_fit_stay(held: int) -> None:
    world = build_world(SHAPE, slices=THREE_SITES, budget=sum(sizes_of_slabs()[:held]))
    slabs = world.site.slabs

    for steps in range(5):
        step(world, [1, 2, 4], sites=range(3))
        assert slabs.num_bytes <= slabs.budget
        assert slabs.builds == 3 + steps * (3 - held)


def test_a_slab_that_is_used_no_more_makes_room() -> None:
    world = build_world(SHAPE, slices=THREE_SITES, budget=max(sizes_of_slabs()))
    slabs = world.site.slabs
    step(world, [1, 2, 4], sites=[0])
    for _ in range(3):
        step(world, [1, 2, 4], sites=[2])

    assert slabs.num_bytes == sizes_of_slabs()[2]
    before = slabs.builds
    step(world, [1, 2, 4], sites=[2])
    assert slabs.builds == before


def test_more_rows_count_against_the_budget() -> None:
    budget = sizes_of_slabs()[0]
    world = build_world(SHAPE, slices=THREE_SITES, budget=budget)
    step(world, [1, 2, 4])
    assert world.site.slabs.num_bytes == budget
    step(world, [1, 2, 4] * 5)
    assert world.site.slabs.num_bytes == 0


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this CPU"
)
def test_weights_are_reordered_once_a_slab_stays_and_few_in_one_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "REORDER_AFTER", 2)
    monkeypatch.setattr(cpu_step, "REORDERS_PER_STEP", 2)
    world = build_world(SHAPE, slices=THREE_SITES, dtype=torch.bfloat16)

    def reordered() -> int:
        plan = build_plan([1, 2, 4], world.slots)
        slabs = [site.slabs.slab(site, site.slabs.step(plan)) for site in world.sites]
        return sum(slab is not None and slab.reordered for slab in slabs)

    assert [reordered() for _ in range(5)] == [0, 0, 2, 3, 3]
    assert world.site.slabs.builds == 3
    step(world, [1, 4], sites=range(3))
    step(world, [3], sites=range(3))
    assert world.site.slabs.builds == 6
    assert reordered() == 0


def test_fp32_is_not_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "REORDER_AFTER", 0)
    world = build_world(SHAPE)
    plan = build_plan([1, 2], world.slots)

    slab = world.site.slabs.slab(world.site, world.site.slabs.step(plan))

    assert slab is not None
    assert not slab.reordered


def test_a_slab_holds_true_rank_rows_only() -> None:
    world = build_world([Cluster((3, 2), ((PAGE + 1,),))])
    plan = build_plan([1], world.slots)

    slab = world.site.slabs.slab(world.site, world.site.slabs.step(plan))

    assert slab is not None
    assert slab.layout.num_rows == len(slab.a) == 5 + PAGE + 1
    assert slab.a.isfinite().all()


def test_gates_follow_the_rows_when_two_slots_of_one_content_become_one() -> None:
    # Rows 0, 2, 4 … ask for the same either way; but only one slot with all of them has many rows.
    world = build_world(SHAPE, blends=[[(0, 1.0)], [(0, 1.0)]])
    assert world.slots[5] == world.slots[6]

    step(world, [5, 4, 6, 4] * 33 + [2])
    step(world, [5, 4, 5, 4] * 33 + [2])

"""The plan made by kernels is the one that the host makes; here mostly in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oneplusn.kernels.device_plan import Capacity, DevicePlan, pack
from oneplusn.kernels.plan import ABSENT, BASE_SLOT, MAX_RUNS, RunKey, SlotInfo, build_plan
from oneplusn.kernels.triton_plan import (
    LAST,
    MAX_ROWS,
    SlotTables,
    build_device_plan,
    scratch_size,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS = 48
NUM_RUNS = 96
POISON = -1_234_567

BLENDS = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=8), max_size=3)


@dataclass(frozen=True)
class Shape:
    """Clusters by whether their tasks have own runs; blends by numbers of tasks; a seed for ids."""

    clusters: list[tuple[bool, list[bool]]]
    blends: list[list[int]]
    seed: int

    def slots(self) -> dict[int, SlotInfo]:
        """Lay the clusters out with ids that sort neither as keys nor as digests do."""
        rng = np.random.default_rng(self.seed)
        run_ids = iter(rng.permutation(NUM_RUNS).tolist())
        slot_ids = iter((1 + rng.permutation(NUM_SLOTS - 1)).tolist())
        runs: dict[RunKey, tuple[int, int]] = {}
        slots: dict[int, SlotInfo] = {}
        tasks: list[SlotInfo] = []
        for number, (has_common, tasks_have_own) in enumerate(self.clusters):
            digest = f"{rng.integers(10**6):06d}-{number}"
            for task, has_own in enumerate(tasks_have_own):
                keys = [(digest, 0)] * has_common + [(digest, 1 + task)] * has_own
                for run_key in keys:
                    runs.setdefault(run_key, (next(run_ids), int(rng.integers(1, 10))))
                key = f"{digest}/{rng.integers(10**6)}"
                tasks.append(_info(key, (digest,), keys, runs))
        for number, parts in enumerate(self.blends if tasks else []):
            infos = [tasks[part % len(tasks)] for part in parts]
            keys = list(dict.fromkeys(chain(*(info.run_keys for info in infos))))
            cluster = tuple(sorted({digest for info in infos for digest in info.cluster}))
            tasks.append(_info(f"blend {number}", cluster, keys[:MAX_RUNS], runs))
        for info in tasks:
            slots[next(slot_ids)] = info
        return slots


def _info(
    key: str,
    cluster: tuple[str, ...],
    keys: Sequence[RunKey],
    runs: Mapping[RunKey, tuple[int, int]],
) -> SlotInfo:
    ids, pages = zip(*(runs[key] for key in keys), strict=True) if keys else ((), ())
    return SlotInfo(key, cluster, ids, tuple(keys), pages)


SHAPES = st.builds(
    Shape,
    clusters=st.lists(
        st.tuples(st.booleans(), st.lists(st.booleans(), max_size=6)), min_size=1, max_size=4
    ),
    blends=BLENDS,
    seed=st.integers(0, 2**32 - 1),
)
# Clusters with many runs; two blends with as many runs as a slot can have; a blend of clusters.
WIDE = Shape([(True, [True] * 8), (True, [False, True]), (False, [True] * 9)], [], 1)
FULL = Shape([(False, [True] * 16)], [list(range(16)), list(range(15, -1, -1))], 2)
SMALL = Shape([(True, [True, True, False]), (True, [True])], [[0, 3]], 3)


def batch_of(slots: Mapping[int, SlotInfo], numbers: Sequence[int]) -> list[int]:
    choice = [BASE_SLOT, *slots]
    return [choice[number % len(choice)] for number in numbers]


def random_batch(slots: Mapping[int, SlotInfo], num_rows: int, seed: int = 0) -> list[int]:
    """Draw slots of which some have many rows and most have few."""
    numbers = np.random.default_rng(seed).geometric(0.15, num_rows)
    return batch_of(slots, numbers.tolist())


def tables_of(slots: Mapping[int, SlotInfo]) -> SlotTables:
    tables = SlotTables(NUM_SLOTS, NUM_RUNS, DEVICE)
    tables.write(slots)
    return tables


def poisoned(size: int) -> Tensor:
    return torch.full((size,), POISON, dtype=torch.int32, device=DEVICE)


def build(
    batch: Sequence[int], tables: SlotTables, capacity: Capacity, tile_rows: int
) -> DevicePlan:
    out = DevicePlan(tile_rows, capacity, poisoned(DevicePlan.size(capacity)))
    scratch = poisoned(scratch_size(len(batch)))
    build_device_plan(on_device(batch), tables, out, scratch)
    return out


def on_device(batch: Sequence[int]) -> Tensor:
    return torch.tensor(batch, dtype=torch.int32, device=DEVICE)


def entries(plan: DevicePlan, num_rows: int) -> dict[str, list[int] | list[list[int]]]:
    """Read what the counts and tiles say is defined."""
    _, num_tiles, num_chunks, _ = plan.counts.tolist()
    tiles = plan.tiles[:num_tiles]
    num_ks = int((tiles[:, 1] * tiles[:, 7]).sum())
    return {
        "counts": plan.counts.tolist(),
        "rows": plan.rows[:num_rows].tolist(),
        "slots": plan.slots[:num_rows].tolist(),
        "tiles": tiles.tolist(),
        "chunks": plan.chunks[:num_chunks].tolist(),
        "places": plan.places[: int(tiles[:, 3].sum())].tolist(),
        "ks": plan.ks[:num_ks].tolist(),
    }


@pytest.mark.parametrize(
    ("num_rows", "tile_rows"),
    [(0, 16), (1, 16), (17, 16), (17, 32), (70, 64), (256, 16), (256, 128)],
)
@pytest.mark.parametrize("shape", [WIDE, FULL, SMALL], ids=["wide", "full", "small"])
def test_equals_the_plan_of_the_host(num_rows: int, shape: Shape, tile_rows: int) -> None:
    slots = shape.slots()
    batch = random_batch(slots, num_rows)
    expected = pack(build_plan(batch, slots, tile_rows=tile_rows))

    built = build(batch, tables_of(slots), expected.capacity, tile_rows)

    assert entries(built, num_rows) == entries(expected, num_rows)


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_equals_the_plan_of_the_host_at_the_largest_batch(tile_rows: int) -> None:
    slots = WIDE.slots()
    batch = random_batch(slots, MAX_ROWS)
    expected = pack(build_plan(batch, slots, tile_rows=tile_rows))

    built = build(batch, tables_of(slots), expected.capacity, tile_rows)

    assert entries(built, MAX_ROWS) == entries(expected, MAX_ROWS)


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_a_tile_can_have_more_chunks_and_ks_than_its_program_has_lanes(tile_rows: int) -> None:
    slots = {
        slot: SlotInfo(f"{slot:02d}", ("c",), (0, slot), (("c", 0), ("c", slot)), (128, 128))
        for slot in range(1, 41)
    }
    expected = pack(build_plan(list(slots), slots, tile_rows=tile_rows))
    lanes = tile_rows * MAX_RUNS
    assert expected.tiles[0, 5] > lanes
    assert expected.tiles[0, 1] * expected.tiles[0, 7] > lanes

    built = build(list(slots), tables_of(slots), expected.capacity, tile_rows)

    assert entries(built, 40) == entries(expected, 40)


@given(
    steps=st.lists(
        st.tuples(SHAPES, st.lists(st.integers(0, 99), min_size=1, max_size=70)),
        min_size=2,
        max_size=2,
    ),
    tile_rows=st.sampled_from([16, 64]),
)
@settings(max_examples=25)
def test_what_an_earlier_step_left_in_the_buffers_does_not_matter(
    steps: list[tuple[Shape, list[int]]], tile_rows: int
) -> None:
    tables = tables_of({})
    capacity = Capacity(rows=70, tiles=80, chunks=2_000, places=8_000, ks=8_000)
    out = DevicePlan(tile_rows, capacity, poisoned(DevicePlan.size(capacity)))
    scratch = poisoned(scratch_size(capacity.rows))
    for shape, numbers in steps:
        slots = shape.slots()
        batch = batch_of(slots, numbers)
        tables.write(slots)

        build_device_plan(on_device(batch), tables, out, scratch)

        expected = pack(build_plan(batch, slots, tile_rows=tile_rows), capacity)
        assert entries(out, len(batch)) == entries(expected, len(batch))


@pytest.mark.parametrize("field", ["tiles", "chunks", "places", "ks"])
def test_a_plan_over_capacity_has_no_tiles_and_stays_in_its_sections(field: str) -> None:
    slots = SMALL.slots()
    batch = random_batch(slots, 30)
    need = Capacity.of(build_plan(batch, slots))
    capacity = need._replace(**{field: getattr(need, field) - 1})
    size = DevicePlan.size(capacity)
    memory = poisoned(size + 4096)
    out = DevicePlan(16, capacity, memory[:size])

    build_device_plan(on_device(batch), tables_of(slots), out, poisoned(scratch_size(30)))

    assert not capacity.holds(need)
    assert out.counts.tolist() == [0, 0, 0, 0]
    for section in (out.chunks, out.places, out.ks, memory[size:]):
        assert torch.all(section == POISON)


def test_a_plan_that_fills_its_capacity_is_whole_and_stays_in_it() -> None:
    slots = SMALL.slots()
    batch = random_batch(slots, 30)
    plan = build_plan(batch, slots)
    capacity = Capacity.of(plan)
    size = DevicePlan.size(capacity)
    memory = poisoned(size + 4096)
    out = DevicePlan(16, capacity, memory[:size])

    build_device_plan(on_device(batch), tables_of(slots), out, poisoned(scratch_size(30)))

    assert entries(out, 30) == entries(pack(plan), 30)
    assert torch.all(memory[size:] == POISON)


@pytest.mark.parametrize("stranger", [-1, NUM_SLOTS - 1, NUM_SLOTS, 2**31 - 1])
def test_a_row_whose_slot_is_not_resident_counts_as_bare(stranger: int) -> None:
    slots = dict(enumerate(SMALL.slots().values(), start=1))
    expected = pack(build_plan([1, 0, 2, 0], slots))

    built = build([1, stranger, 2, 0], tables_of(slots), expected.capacity, 16)

    assert entries(built, 4) == entries(expected, 4)


SLOTS = {
    3: SlotInfo("b/x", ("b",), (0, 4), (("b", 0), ("b", 1)), (5, 1)),
    1: SlotInfo("b/y", ("b",), (0,), (("b", 0),), (5,)),
    2: SlotInfo("a/x", ("a",), (), (), ()),
    5: SlotInfo("b/x+a/x", ("a", "b"), (4, 0), (("b", 1), ("b", 0)), (1, 5)),
}


def test_tables_of_slots() -> None:
    tables = SlotTables(slots=6, runs=5, device=DEVICE)
    tables.write({4: SlotInfo("gone", ("z",), (1, 2), (("z", 0), ("z", 1)), (7, 8))})
    tables.write(SLOTS)

    none = [ABSENT] * MAX_RUNS
    assert tables.slot_order.tolist()[:6] == [LAST, 3, 0, 2, LAST, 1]
    assert [tables.slot_cluster[slot].item() for slot in SLOTS] == [2, 2, 0, 1]
    assert [runs[:3] for runs in tables.slot_runs.tolist()[:6]] == [
        none[:3],
        [0, ABSENT, ABSENT],
        none[:3],
        [0, 4, ABSENT],
        none[:3],
        [4, 0, ABSENT],
    ]
    assert torch.all(tables.slot_runs[:, 2:] == ABSENT)
    assert tables.run_order.tolist()[:5] == [0, LAST, LAST, LAST, 1]
    assert [tables.run_pages[run].item() for run in (0, 4)] == [5, 1]


@pytest.mark.gpu
def test_a_captured_build_follows_the_rows() -> None:
    slots = WIDE.slots()
    tables = tables_of(slots)
    capacity = Capacity(rows=64, tiles=64, chunks=1_000, places=4_000, ks=8_000)
    out = DevicePlan(16, capacity, poisoned(DevicePlan.size(capacity)))
    scratch = poisoned(scratch_size(64))
    row_slots = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    build_device_plan(row_slots, tables, out, scratch)  # compiles, which no capture may
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        build_device_plan(row_slots, tables, out, scratch)
    for seed in range(20):
        batch = random_batch(slots, 64, seed)
        row_slots.copy_(on_device(batch))

        graph.replay()

        expected = pack(build_plan(batch, slots), capacity)
        assert entries(out, 64) == entries(expected, 64)

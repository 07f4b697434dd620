"""build_plan, as tables: what goes in, what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oneplusn.kernels.plan import (
    ABSENT,
    MAX_RUNS,
    Plan,
    Planner,
    RunKey,
    SiteSpec,
    SiteTable,
    SlotInfo,
    build_plan,
)


def slot_info(
    key: str, cluster: tuple[str, ...], runs: tuple[int, ...], run_keys: tuple[RunKey, ...]
) -> SlotInfo:
    """Describe a slot whose runs have as many pages as their id, plus one."""
    return SlotInfo(key, cluster, runs, run_keys, tuple(run + 1 for run in runs))


# Cluster "b" comes second by digest though its ids come first, so an order by id shows.
SLOTS = {
    1: slot_info("b/x", ("b",), (0, 1), (("b", 0), ("b", 1))),
    2: slot_info("b/y", ("b",), (0, 2), (("b", 0), ("b", 2))),
    3: slot_info("a/x", ("a",), (9, 7), (("a", 0), ("a", 1))),
    4: slot_info("a/y", ("a",), (9,), (("a", 0),)),
    5: slot_info("lone", ("c",), (5,), (("c", 0),)),
    # Half of b's x and half of a's y: a cluster of its own, runs in the order of the request.
    6: slot_info("b/x*.5+a/y*.5", ("a", "b"), (0, 1, 9), (("b", 0), ("b", 1), ("a", 0))),
}
_ = ABSENT


@dataclass(frozen=True)
class Case:
    """A batch, and the fields of its plan; the matrices of k as nested lists, one per tile."""

    batch: list[int]
    rows: list[int]
    tile_rows: list[int]
    runs: list[list[int]]
    ks: list[list[list[int]]]
    clusters: list[tuple[int, int]]
    segments: list[tuple[int, int, int]]
    limit: int = 16


CASES = {
    "empty batch": Case([], [], [0], [], [], [], []),
    "base only": Case([0, 0], [], [0], [], [], [], []),
    "one row": Case([1], [0], [0, 1], [[0, 1]], [[[0, 1]]], [(0, 1)], [(1, 0, 1)]),
    "one row without own expert": Case([0, 4], [1], [0, 1], [[9]], [[[0]]], [(0, 1)], [(4, 0, 1)]),
    "two tasks of a cluster share a tile": Case(
        [2, 1, 2],
        [1, 0, 2],
        [0, 3],
        [[0, 1, 2]],
        [[[0, 1, _], [0, _, 1], [0, _, 1]]],
        [(0, 3)],
        [(1, 0, 1), (2, 1, 3)],
    ),
    "cut at the cluster's end, clusters and runs ordered by digest": Case(
        [1, 3, 0, 4],
        [1, 3, 0],
        [0, 2, 3],
        [[9, 7], [0, 1]],
        [[[0, 1], [0, _]], [[0, 1]]],
        [(0, 2), (2, 3)],
        [(3, 0, 1), (4, 1, 2), (1, 2, 3)],
    ),
    "a blend is a cluster of its own": Case(
        [1, 6, 4],
        [2, 1, 0],
        [0, 1, 2, 3],
        [[9], [9, 0, 1], [0, 1]],
        [[[0]], [[2, 0, 1]], [[0, 1]]],
        [(0, 1), (1, 2), (2, 3)],
        [(4, 0, 1), (6, 1, 2), (1, 2, 3)],
    ),
    "no tile has more rows than the limit, and each its own union": Case(
        [1, 2, 1, 2, 2],
        [0, 2, 1, 3, 4],
        [0, 2, 4, 5],
        [[0, 1], [0, 2], [0, 2]],
        [[[0, 1], [0, 1]], [[0, 1], [0, 1]], [[0, 1]]],
        [(0, 5)],
        [(1, 0, 2), (2, 2, 5)],
        limit=2,
    ),
    "a tile that begins within a task and ends within another": Case(
        [1, 1, 2, 2, 5],
        [0, 1, 2, 3, 4],
        [0, 3, 4, 5],
        [[0, 1, 2], [0, 2], [5]],
        [[[0, 1, _], [0, 1, _], [0, _, 1]], [[0, 1]], [[0]]],
        [(0, 4), (4, 5)],
        [(1, 0, 2), (2, 2, 4), (5, 4, 5)],
        limit=3,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_plan_of(case: Case) -> None:
    plan = build_plan(case.batch, SLOTS, tile_rows=case.limit)

    assert plan.num_rows == len(case.batch)
    assert plan.max_tile_rows == case.limit
    assert plan.run_pages == {run: run + 1 for run in plan.runs.tolist()}
    assert plan.empty == (not case.rows)
    assert plan.rows.tolist() == case.rows
    assert plan.slots.tolist() == [case.batch[row] for row in case.rows]
    assert plan.tile_rows.tolist() == case.tile_rows
    assert plan.tile_runs.tolist() == bounds([len(runs) for runs in case.runs])
    assert plan.runs.tolist() == list(chain(*case.runs))
    flat = [[k for row in tile for k in row] for tile in case.ks]
    assert plan.tile_ks.tolist() == bounds([len(ks) for ks in flat])
    assert plan.ks.tolist() == list(chain(*flat))
    assert list(plan.clusters) == case.clusters
    assert list(plan.segments) == case.segments
    assert list(plan.run_keys.values()) == sorted(plan.run_keys.values())
    assert set(plan.run_keys) == set(plan.runs.tolist())
    for name in ("rows", "slots", "tile_rows", "tile_runs", "runs", "tile_ks", "ks"):
        assert getattr(plan, name).dtype == np.int32, name


def bounds(sizes: list[int]) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()]


@given(st.lists(st.integers(0, 6), max_size=70), st.integers(1, 40))
def test_every_row_finds_its_runs_in_its_tile(batch: list[int], limit: int) -> None:
    plan = build_plan(batch, SLOTS, tile_rows=limit)

    assert sorted(plan.rows.tolist()) == [row for row, slot in enumerate(batch) if slot]
    assert np.all(np.diff(plan.tile_rows) <= limit)
    assert [s.stop for s in plan.segments[:-1]] == [s.start for s in plan.segments[1:]]
    for position, row in enumerate(plan.rows):
        expected = {run: k for k, run in enumerate(SLOTS[batch[row]].runs)}
        assert dict(plan.uses(position)) == expected
        assert in_tile(plan, position) == list(plan.uses(position))


def in_tile(plan: Plan, position: int) -> list[tuple[int, int]]:
    """Read the runs of a row and their k from the matrix of its tile."""
    tile = int(np.searchsorted(plan.tile_rows, position, side="right")) - 1
    runs = plan.runs[plan.tile_runs[tile] : plan.tile_runs[tile + 1]].tolist()
    ks = plan.ks[plan.tile_ks[tile] : plan.tile_ks[tile + 1]].reshape(-1, len(runs))
    row = ks[position - plan.tile_rows[tile]].tolist()
    return [(run, k) for run, k in zip(runs, row, strict=True) if k != ABSENT]


@given(st.permutations([1, 1, 2, 3, 0, 6, 5, 4, 2]))
def test_the_order_of_the_batch_changes_neither_tiles_nor_runs(batch: list[int]) -> None:
    plan, other = build_plan(batch, SLOTS), build_plan(sorted(batch), SLOTS)

    assert plan.slots.tolist() == other.slots.tolist()
    assert plan.runs.tolist() == other.runs.tolist()
    assert plan.ks.tolist() == other.ks.tolist()


SAME = slot_info("a/x", ("a",), (8, 6), (("a", 0), ("a", 1)))
OTHER_VERSION = slot_info("a/x", ("a2",), (8, 6), (("a2", 0), ("a2", 1)))


@pytest.mark.parametrize(
    ("batch", "info", "equal"),
    [
        pytest.param([0, 3, 1], SLOTS[3], True, id="same"),
        pytest.param([0, 3, 1], SAME, True, id="other ids, same content"),
        pytest.param([0, 3, 1], OTHER_VERSION, False, id="same task, runs of another version"),
        pytest.param([3, 0, 1], SLOTS[3], False, id="other order"),
        pytest.param([0, 3, 3, 1], SLOTS[3], False, id="one row more"),
    ],
)
def test_composition_is_known_by_content(batch: list[int], info: SlotInfo, *, equal: bool) -> None:
    key = build_plan([0, 3, 1], SLOTS).key

    assert (build_plan(batch, {**SLOTS, 3: info}).key == key) is equal


class TestPlanner:
    """What a planner makes is what `build_plan` makes, whatever it has made before."""

    @given(
        st.lists(
            st.tuples(st.lists(st.sampled_from([0, 1, 3, 6]), max_size=5), st.booleans()),
            max_size=6,
        )
    )
    def test_it_notices_every_change(self, steps: list[tuple[list[int], bool]]) -> None:
        slots = dict(SLOTS)
        planner = Planner(slots)
        for batch, is_replaced in steps:
            slots[3] = OTHER_VERSION if is_replaced else SLOTS[3]
            plan, expected = planner.plan(batch), build_plan(batch, slots)
            assert plan.key == expected.key
            assert (plan.segments, plan.infos) == (expected.segments, expected.infos)
            for name in ("rows", "slots", "tile_rows", "runs", "ks"):
                assert np.array_equal(getattr(plan, name), getattr(expected, name)), name

    def test_without_a_change_nothing_is_made_again(self) -> None:
        planner = Planner(SLOTS)
        first = planner.plan([0, 3, 1])
        tiles = first.ks
        again = planner.plan([0, 3, 1])
        assert again is not first  # it is another step
        assert again.rows is first.rows
        assert again.ks is tiles

    def test_a_row_of_a_slot_that_has_left_is_an_error(self) -> None:
        slots = dict(SLOTS)
        planner = Planner(slots)
        planner.plan([1, 3])
        del slots[3]
        with pytest.raises(KeyError):
            planner.plan([1, 3])


def test_a_row_of_an_unknown_slot_is_an_error() -> None:
    with pytest.raises(KeyError):
        build_plan([1, 77], SLOTS)


def test_a_slot_takes_no_more_runs_than_a_table_has_columns() -> None:
    runs = tuple(range(MAX_RUNS))
    assert slot_info("k", ("a",), runs, tuple(("a", run) for run in runs)).runs == runs
    with pytest.raises(AssertionError):
        slot_info("k", ("a",), (*runs, 99), tuple(("a", run) for run in (*runs, 99)))


def test_a_site_knows_where_its_slices_begin() -> None:
    spec = SiteSpec("m.q+k+v", 8, (16, 4, 4), ("m.q", "m.k", "m.v"))

    assert (spec.num_slices, spec.out_features, spec.bounds) == (3, 24, (0, 16, 20, 24))


def test_a_table_holds_what_was_set_until_it_is_cleared() -> None:
    table = SiteTable(runs=4, slots=3, gates=100)
    table.set_run(2, first=5, rows=17)
    table.set_gates(1, 1, 40, torch.tensor([0.5, -2.0]))

    runs = (table.run_first, table.run_pages, table.run_rows)
    assert [array.tolist() for array in runs] == [[0, 0, 5, 0], [0, 0, 2, 0], [0, 0, 17, 0]]
    assert table.gate_first[1, 1] == 40
    assert table.gates[39:43].tolist() == [0.0, 0.5, -2.0, 0.0]

    table.clear_run(2)
    table.clear_slot(1)
    assert not any(array.any() for array in (*runs, table.gate_first))

"""Who is resident, who may leave, and that every slot computes what its tasks say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.image import page_image
from oneplusn.adapters.pool import Pool, Reservation
from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.space import Ranges, Span
from oneplusn.errors import (
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    InvalidRequest,
    MemoryPlanRefused,
    PoolExhausted,
)
from oneplusn.kernels.ops import gated_delta
from oneplusn.kernels.plan import BASE_SLOT, SiteSpec, build_plan
from random_bundles import delta_weight, make_bundle, shapes_of
from tolerances import assert_close

QKV = SiteSpec("l.0.q+k+v", 6, (4, 2, 2), ("l.0.q", "l.0.k", "l.0.v"))
DOWN = SiteSpec("l.0.down", 5, (3,), ("l.0.down",))
SPECS = (QKV, DOWN)
SHAPES = shapes_of(SPECS)
Refs = tuple[TaskRef, ...]


def pool_of(pages: int, *, max_tasks: int = 16) -> Pool:
    """A pool of this many pages at each site."""
    with pytest.raises(MemoryPlanRefused) as refused:
        Pool(SPECS, memory_bytes=0, dtype=torch.float32, max_tasks=max_tasks)
    page, tables = (
        int(number)
        for number in re.findall(r"one takes (\d+) bytes, beside (\d+)", refused.value.message)[0]
    )
    return Pool(SPECS, memory_bytes=tables + pages * page, dtype=torch.float32, max_tasks=max_tasks)


def lora(seed: int, pages: int = 1) -> Bundle:
    """One task "t0" with one run of this many pages at each site."""
    return make_bundle(SHAPES, seed=seed, own={"t0": 16 * pages})


def load(pool: Pool, *bundles: Bundle) -> None:
    for bundle in bundles:
        pool.load(page_image(bundle, SPECS, torch.float32))


def ref(bundle: Bundle, task: str = "t0", weight: float = 1.0) -> TaskRef:
    return TaskRef(bundle.digest, task, weight)


def loaded(pool: Pool) -> list[str]:
    return [version.digest for version in pool.resident()]


def digests(*bundles: Bundle) -> list[str]:
    return [bundle.digest for bundle in bundles]


def check_outputs(pool: Pool, bundles: Sequence[Bundle], rows: Sequence[tuple[int, Refs]]) -> None:
    """Compare a step with these (slot, what it stands for) against the weights' own products."""
    by_digest = {bundle.digest: bundle for bundle in bundles}
    plan = build_plan([slot for slot, _ in rows], pool.slots)
    for spec in SPECS:
        x = torch.randn(len(rows), spec.in_features, generator=torch.Generator().manual_seed(7))
        ys = [torch.full((len(rows), width), 0.5) for width in spec.slices]
        gated_delta(ys, x, pool.sites[spec.name], plan)
        for path, y in zip(spec.modules, ys, strict=True):
            for t, (_, refs) in enumerate(rows):
                expected = torch.full((y.shape[1],), 0.5, dtype=torch.float64)
                for task in refs:
                    weight = delta_weight(by_digest[task.digest], task.task, path)
                    if weight is not None:
                        expected += task.weight * (weight @ x[t].double())
                assert_close(y[t], expected, dtype=torch.float32)


# Ranges


def test_ranges_are_taken_first_fit_and_merge_when_given_back() -> None:
    ranges = Ranges(10)
    a, b, c = ranges.take(3), ranges.take(2), ranges.take(4)
    assert (a, b, c) == (Span(0, 3), Span(3, 2), Span(5, 4))
    assert ranges.take(2) is None
    ranges.give(a)
    ranges.give(c)
    assert ranges.free == [Span(0, 3), Span(5, 5)]
    assert (ranges.num_free, ranges.largest) == (8, 5)
    assert ranges.take(2) == Span(0, 2)
    assert ranges.take(4) == Span(5, 4)
    assert ranges.take(0) == Span(0, 0)
    ranges.give(b)
    assert ranges.free == [Span(2, 3), Span(9, 1)]


# Memory


def test_a_budget_below_one_page_at_each_site_is_refused_with_the_least_that_would_do() -> None:
    with pytest.raises(MemoryPlanRefused) as refused:
        Pool(SPECS, memory_bytes=1000, dtype=torch.float32, max_tasks=4)
    least = int(re.findall(r"give at least (\d+)", refused.value.message)[0])
    assert refused.value.message.startswith("1000 bytes")
    with pytest.raises(MemoryPlanRefused):
        Pool(SPECS, memory_bytes=least - 1, dtype=torch.float32, max_tasks=4)
    pool = Pool(SPECS, memory_bytes=least, dtype=torch.float32, max_tasks=4)
    assert [len(site.a) for site in pool.sites.values()] == [1, 1]


def test_every_site_has_as_many_pages_within_the_budget() -> None:
    pool = Pool(SPECS, memory_bytes=1 << 20, dtype=torch.bfloat16, max_tasks=4)
    pages = [(len(site.a), len(site.b)) for site in pool.sites.values()]
    assert pages[0] == pages[1]
    assert pages[0][0] == pages[0][1] > 100
    tables = [site.table for site in pool.sites.values()]
    table_bytes = sum(
        t.nbytes for table in tables for t in (table.gates, table.gate_first, table.run_first)
    )
    assert 0.25 * (1 << 20) < pool.num_bytes < (1 << 20) - table_bytes


# Loading


def test_a_version_is_written_in_pieces_and_acquired_only_when_published() -> None:
    pool, bundle = pool_of(4), make_bundle(SHAPES, seed=1, tasks=("t0", "t1"), common=(2,))
    image = page_image(bundle, SPECS, torch.float32)

    reservation = pool.reserve(image)
    assert pool.used_bytes == image.num_bytes
    pieces = []
    for piece in pool.write(reservation):
        pieces.append(piece)
        assert not pool.is_resident(bundle.digest)
        with pytest.raises(AdapterNotFound, match="not resident"):
            pool.acquire([ref(bundle)])
        pool.check_integrity()
    pool.publish(reservation)

    # A common run and two own ones at either site.
    assert len(pieces) == 6
    assert sum(pieces) == image.num_bytes
    assert loaded(pool) == digests(bundle)
    slots = [(pool.acquire([task]), (task,)) for task in (ref(bundle), ref(bundle, "t1"))]
    check_outputs(pool, [bundle], [*slots, (BASE_SLOT, ())])


@pytest.mark.parametrize("num_pieces", [0, 1, 2])
def test_an_aborted_reservation_leaves_nothing(num_pieces: int) -> None:
    pool, bundle = pool_of(2), lora(1)
    for _ in range(20):
        reservation = pool.reserve(page_image(bundle, SPECS, torch.float32))
        writer = pool.write(reservation)
        for _ in range(num_pieces):
            next(writer)
        pool.abort(reservation)
        pool.check_integrity()
        assert pool.used_bytes == 0
    load(pool, bundle)


def test_a_version_is_loaded_once() -> None:
    pool, bundle = pool_of(2), lora(1)
    reservation = pool.reserve(page_image(bundle, SPECS, torch.float32))
    with pytest.raises(AdapterExists):
        pool.reserve(page_image(bundle, SPECS, torch.float32))
    pool.abort(reservation)
    load(pool, bundle)
    with pytest.raises(AdapterExists):
        pool.reserve(page_image(bundle, SPECS, torch.float32))
    load(pool, bundle)
    assert loaded(pool) == digests(bundle)


def test_memory_used_again_brings_nothing_back() -> None:
    pool, wide, narrow = pool_of(1), make_bundle(SHAPES, seed=1, own={"t0": 16}), lora(2)
    narrow = make_bundle(SHAPES, seed=2, own={"t0": 1})
    slots = []
    for bundle in (wide, narrow, wide):
        load(pool, bundle)
        slots.append(pool.acquire([ref(bundle)]))
        check_outputs(pool, [bundle], [(slots[-1], (ref(bundle),)), (BASE_SLOT, ())])
        pool.release(slots[-1])
        pool.unload(bundle.digest)
        pool.check_integrity()
    assert len(set(slots)) == 1


# Eviction


def test_idle_versions_leave_in_the_order_of_their_last_use_and_only_as_needed() -> None:
    pool = pool_of(4)
    a, b, c, d = (lora(seed) for seed in range(4))
    load(pool, a, b, c, d)
    pool.release(pool.acquire([ref(b)]))
    pool.release(pool.acquire([ref(a)]))
    assert loaded(pool) == digests(c, d, b, a)

    load(pool, two := lora(4, pages=2))
    assert loaded(pool) == digests(b, a, two)
    load(pool, e := lora(5), f := lora(6))
    assert loaded(pool) == digests(two, e, f)
    load(pool, other := lora(7, pages=2))
    assert loaded(pool) == digests(e, f, other)


def test_a_version_is_in_use_until_it_is_released() -> None:
    pool, a, b = pool_of(2), lora(1), lora(2)
    load(pool, a, b)
    slot = pool.acquire([ref(a)])
    pool.release(pool.acquire([ref(b)]))
    assert loaded(pool) == digests(a, b)
    pool.release(slot)
    assert loaded(pool) == digests(b, a)


def test_referenced_and_pinned_versions_stay() -> None:
    pool = pool_of(3)
    a, b, c = (lora(seed) for seed in range(3))
    load(pool, a, b, c)
    pool.pin(a.digest)
    slot = pool.acquire([ref(b)])
    load(pool, d := lora(3))
    assert loaded(pool) == digests(a, b, d)

    pool.release(slot)
    pool.pin(a.digest)
    pool.unpin(a.digest)
    load(pool, two := lora(4, pages=2))
    assert loaded(pool) == digests(a, two)

    pool.unpin(a.digest)
    load(pool, three := lora(5, pages=3))
    assert loaded(pool) == digests(three)


def test_a_blend_holds_every_version_that_it_touches() -> None:
    pool = pool_of(3)
    a, b, c = (lora(seed) for seed in range(3))
    load(pool, a, b, c)
    blend = (ref(a, weight=0.5), ref(b, weight=0.5))
    slot = pool.acquire(blend)
    load(pool, d := lora(3))
    assert loaded(pool) == digests(a, b, d)
    with pytest.raises(AdapterError, match="1 references and 0 pins"):
        pool.unload(b.digest)
    check_outputs(pool, [a, b], [(slot, blend)])


def state(pool: Pool) -> list[object]:
    tables = [
        tensor.clone()
        for site in pool.sites.values()
        for tensor in (site.a, site.b, site.table.run_first, site.table.run_rows, site.table.gates)
    ]
    return [pool.resident(), dict(pool.slots), pool.used_bytes, [t.tolist() for t in tables]]


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        pytest.param(2, "takes 2 pages at l.0.q+k+v; 1 of 3 are free, 1 of them", id="held"),
        pytest.param(9, "takes 9 pages at l.0.q+k+v; 1 of 3 are free", id="larger-than-the-pool"),
    ],
)
def test_what_cannot_fit_changes_nothing(pages: int, message: str) -> None:
    pool = pool_of(3)
    a, b, c = (lora(seed) for seed in range(3))
    load(pool, a, b, c)
    pool.acquire([ref(a)])
    pool.pin(b.digest)
    before = state(pool)
    with pytest.raises(PoolExhausted, match=re.escape(message)) as refused:
        load(pool, lora(3, pages=pages))
    assert "even without the 1 idle adapters" in refused.value.message
    assert state(pool) == before
    pool.check_integrity()


def test_slots_run_out_like_pages() -> None:
    pool = pool_of(8, max_tasks=2)
    a, b = lora(1), make_bundle(SHAPES, seed=2, tasks=("t0", "t1"))
    load(pool, a)
    slot = pool.acquire([ref(a)])
    with pytest.raises(PoolExhausted, match=r"takes 2 slots; 1 of 3 are free"):
        load(pool, b)
    pool.release(slot)
    load(pool, b)
    assert loaded(pool) == digests(b)


def test_unload_frees_and_tells_the_bytes() -> None:
    pool, a, b = pool_of(3), lora(1), lora(2, pages=2)
    load(pool, a, b)
    used = pool.used_bytes
    freed = pool.unload(b.digest)
    assert freed == page_image(b, SPECS, torch.float32).num_bytes
    assert pool.used_bytes == used - freed
    for digest in (b.digest, "sha256:unknown"):
        with pytest.raises(AdapterNotFound):
            pool.unload(digest)
    pool.pin(a.digest)
    with pytest.raises(AdapterError, match="0 references and 1 pins"):
        pool.unload(a.digest)
    pool.unpin(a.digest)
    with pytest.raises(AdapterError, match="not pinned"):
        pool.unpin(a.digest)
    pool.unload(a.digest)
    assert pool.used_bytes == 0


def test_compaction_makes_room_for_a_long_run() -> None:
    pool = pool_of(4)
    a, b, c, d = (lora(seed) for seed in range(4))
    load(pool, a, b, c, d)
    slots = [(pool.acquire([ref(x)]), (ref(x),)) for x in (b, d)]
    blend = (ref(b, weight=2.0), ref(d))
    slots.append((pool.acquire(blend), blend))
    pool.unload(a.digest)
    pool.unload(c.digest)
    long = lora(4, pages=2)
    with pytest.raises(PoolExhausted, match="2 of 4 are free, 1 of them in one piece"):
        load(pool, long)

    assert pool.compact() == pool.used_bytes
    pool.check_integrity()
    assert pool.compact() == 0
    load(pool, long)
    slots.append((pool.acquire([ref(long)]), (ref(long),)))
    check_outputs(pool, [b, d, long], slots)


# References and blends


def cluster_pool() -> tuple[Pool, Bundle, Bundle]:
    pool = pool_of(32, max_tasks=32)
    a = make_bundle(SHAPES, seed=1, tasks=("t0", "t1", "t2"), common=(2, 3))
    b = make_bundle({"l.0.down": (5, 3)}, seed=2, common=(1,), tasks=("u0", "u1"), own={"u1": 4})
    load(pool, a, b)
    return pool, a, b


def test_a_slot_is_a_task_or_the_base() -> None:
    pool, a, _ = cluster_pool()
    assert pool.acquire([]) == BASE_SLOT
    pool.release(BASE_SLOT)
    slots = {task: pool.acquire([ref(a, task)]) for task in a.tasks}
    assert len({BASE_SLOT, *slots.values()}) == 4
    assert pool.acquire([ref(a, "t1")]) == slots["t1"]
    info = pool.slots[slots["t1"]]
    assert info.key == a.task_digest("t1")
    assert info.cluster == (a.digest,)
    assert info.run_keys == ((a.digest, 0), (a.digest, 2))


def test_equal_blends_share_a_slot_until_the_last_is_released() -> None:
    pool, a, b = cluster_pool()
    free = len(pool.slots)
    blend = (ref(a, "t0", 0.25), ref(b, "u1", 0.75))
    first = pool.acquire(blend)
    assert pool.acquire(blend[::-1]) == first
    assert pool.acquire([ref(a, "t0", 0.5), ref(a, "t0", -0.25), blend[1]]) == first
    assert pool.acquire([ref(a, "t0", 0.25)]) != first
    assert pool.slots[first].cluster == tuple(sorted(digests(a, b)))
    assert len(pool.slots) == free + 2
    pool.release(first)
    pool.release(first)
    check_outputs(pool, [a, b], [(first, blend)])
    pool.release(first)
    assert first not in pool.slots
    pool.check_integrity()


def test_weights_of_a_run_that_tasks_share_add_up() -> None:
    pool, a, b = cluster_pool()
    blend = (ref(a, "t0", 0.5), ref(a, "t1", -2.0), ref(a, "t2", 0.25), ref(b, "u0"))
    slot = pool.acquire(blend)
    keys = pool.slots[slot].run_keys
    assert len(keys) == len(set(keys)) == 5
    assert keys.count((a.digest, 0)) == 1
    twice = (ref(b, "u1", 0.5), ref(b, "u1", 0.25))
    check_outputs(pool, [a, b], [(slot, blend), (pool.acquire(twice), twice), (BASE_SLOT, ())])


def test_one_task_of_weight_one_is_no_blend() -> None:
    pool, a, _ = cluster_pool()
    assert pool.acquire([ref(a, "t0", 0.5), ref(a, "t0", 0.5)]) == pool.acquire([ref(a, "t0")])


@pytest.mark.parametrize(
    "weights",
    [[0.0], [float("nan")], [float("inf")], [1e39], [3.4e38, 3.4e38], [1.0, -1.0]],
    ids=str,
)
def test_a_weight_must_be_a_number_that_does_something(weights: list[float]) -> None:
    pool, a, _ = cluster_pool()
    for call in (pool.acquire, pool.task_key):
        with pytest.raises(InvalidRequest, match="weight"):
            call([ref(a, "t0", weight) for weight in weights])
    assert not any(version.refs for version in pool.resident())


def test_gates_of_a_blend_stay_within_fp32() -> None:
    pool, a, _ = cluster_pool()
    with pytest.raises(InvalidRequest, match="leave the range of float32"):
        pool.acquire([ref(a, "t0", 3.4e38), ref(a, "t1", 3.4e38)])
    pool.check_integrity()


def test_a_blend_has_eight_tasks_at_most() -> None:
    pool = pool_of(16, max_tasks=32)
    tasks = tuple(f"t{i}" for i in range(9))
    bundle = make_bundle(SHAPES, seed=1, tasks=tasks, common=(2,))
    load(pool, bundle)
    blend = [ref(bundle, task, 0.125) for task in tasks[:8]]
    check_outputs(pool, [bundle], [(pool.acquire([*blend, blend[0]]), (*blend, blend[0]))])
    with pytest.raises(InvalidRequest, match="9 tasks; at most 8"):
        pool.acquire([*blend, ref(bundle, "t8")])


def test_what_is_not_there_is_named() -> None:
    pool, a, _ = cluster_pool()
    with pytest.raises(AdapterNotFound, match="no task 'x'; it has t0, t1, t2"):
        pool.acquire([ref(a, "t0"), ref(a, "x")])
    with pytest.raises(AdapterNotFound, match="sha256:none is not resident"):
        pool.acquire([ref(a, "t0"), TaskRef("sha256:none", "t0")])
    assert not any(version.refs for version in pool.resident())


def test_a_new_blend_can_evict_what_it_does_not_touch() -> None:
    pool = pool_of(8, max_tasks=3)
    a, b, c = (lora(seed) for seed in range(3))
    load(pool, a, b, c)
    slot = pool.acquire([ref(a, weight=0.5), ref(b, weight=0.5)])
    assert loaded(pool) == digests(a, b)
    with pytest.raises(PoolExhausted, match=r"a blend takes 1 slots; 0 of 4 are free"):
        pool.acquire([ref(a, weight=2.0)])
    assert [version.refs for version in pool.resident()] == [1, 1]
    pool.release(slot)
    pool.acquire([ref(a, weight=2.0)])


def test_the_key_of_the_kv_prefix_is_the_content_of_the_request() -> None:
    pool, a, b = cluster_pool()
    t0, u1 = ref(a, "t0", 0.5), ref(b, "u1", 0.5)
    keys = {
        "base": pool.task_key([]),
        "t0": pool.task_key([ref(a, "t0")]),
        "t1": pool.task_key([ref(a, "t1")]),
        "half": pool.task_key([t0]),
        "blend": pool.task_key([t0, u1]),
        "other": pool.task_key([t0, ref(b, "u1", 0.25)]),
    }
    assert len(set(keys.values())) == len(keys)
    assert keys["base"] == "base"
    assert keys["t0"] == a.task_digest("t0")
    assert pool.task_key([u1, t0]) == keys["blend"]
    assert pool.slots[pool.acquire([t0, u1])].key == keys["blend"]


def test_the_key_does_not_depend_on_what_else_a_version_holds() -> None:
    pool, a, b = cluster_pool()
    key = pool.task_key([ref(a, "t0", 0.5), ref(b, "u1", 0.5)])
    for note in ("one", "two", "three", "four"):
        other = replace(a, metadata={"note": note})
        load(pool, other)
        assert pool.task_key([ref(other, "t0", 0.5), ref(b, "u1", 0.5)]) == key


# Everything at once

LIBRARY = (
    make_bundle(SHAPES, seed=1, tasks=("t0", "t1", "t2"), common=(2, 5), own={"t0": 3, "t2": 17}),
    make_bundle({"l.0.down": (5, 3)}, seed=2, tasks=("t0",), own={"t0": 8}),
    make_bundle(SHAPES, seed=3, own={"t0": 40}),
    make_bundle(SHAPES, seed=4, tasks=("t0", "t1", "t2", "t3"), common=(1, 4, 2), own={}),
    make_bundle(
        {"l.0.q": (6, 4), "l.0.v": (6, 2)},
        seed=5,
        tasks=("t0", "t1"),
        common=(3,),
        gates_differ=True,
    ),
    make_bundle(SHAPES, seed=6, own={"t0": 16 * 7}),
)
IMAGES = tuple(page_image(bundle, SPECS, torch.float32) for bundle in LIBRARY)
WEIGHTS = st.sampled_from((1.0, 0.5, -2.0, 0.25))


class PoolMachine(RuleBasedStateMachine):
    """Do anything in any order, and keep the count of references and pins beside the pool."""

    @initialize()
    def start(self) -> None:
        self.pool = pool_of(6, max_tasks=9)
        self.writing: list[tuple[Reservation, Iterator[int]]] = []
        self.by_last_use: list[str] = []
        self.pins = Counter[str]()
        self.held: list[tuple[int, Refs]] = []

    def use(self, refs: Refs) -> None:
        """Versions that one request names are used at the same time, in any order."""
        now = {task.digest for task in refs}
        later = [digest for digest in loaded(self.pool) if digest in now]
        self.by_last_use = [d for d in self.by_last_use if d not in now] + later

    def refs_of(self, digest: str) -> int:
        """A request counts once on each version that it names."""
        return sum(digest in {task.digest for task in refs} for _, refs in self.held)

    def idle(self) -> list[str]:
        return [d for d in loaded(self.pool) if not (self.refs_of(d) or self.pins[d])]

    def check_evicted(self, before: list[str], idle: list[str]) -> None:
        gone = [digest for digest in before if not self.pool.is_resident(digest)]
        assert gone == idle[: len(gone)]

    @rule(index=st.integers(0, len(LIBRARY) - 1))
    def reserve(self, index: int) -> None:
        image, before, idle = IMAGES[index], loaded(self.pool), self.idle()
        there = self.pool.is_resident(image.digest)
        there |= any(reservation.image is image for reservation, _ in self.writing)
        used = self.pool.used_bytes
        try:
            reservation = self.pool.reserve(image)
        except AdapterExists:
            assert there
        except PoolExhausted:
            assert (loaded(self.pool), self.pool.used_bytes) == (before, used)
        else:
            assert not there
            self.writing.append((reservation, self.pool.write(reservation)))
            self.check_evicted(before, idle)

    @rule(index=st.integers(0, len(LIBRARY) - 1))
    def load(self, index: int) -> None:
        count = len(self.writing)
        self.reserve(index)
        if len(self.writing) > count:
            self.publish_one(self.writing[-1])

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), pieces=st.integers(1, 3))
    def write(self, data: st.DataObject, pieces: int) -> None:
        _, writer = data.draw(st.sampled_from(self.writing))
        for _ in range(pieces):
            next(writer, None)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self.publish_one(data.draw(st.sampled_from(self.writing)))

    def publish_one(self, entry: tuple[Reservation, Iterator[int]]) -> None:
        self.writing.remove(entry)
        for _ in entry[1]:
            pass
        self.pool.publish(entry[0])
        self.by_last_use.append(entry[0].image.digest)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.writing))
        self.writing.remove(entry)
        self.pool.abort(entry[0])

    @precondition(lambda self: self.pool.resident())
    @rule(data=st.data(), weights=st.lists(WEIGHTS, max_size=4))
    def acquire(self, data: st.DataObject, weights: list[float]) -> None:
        tasks = [ref(b, t) for b in LIBRARY if self.pool.is_resident(b.digest) for t in b.tasks]
        refs = tuple(
            TaskRef(task.digest, task.task, weight)
            for weight in weights
            for task in [data.draw(st.sampled_from(tasks))]
        )
        before, idle = loaded(self.pool), self.idle()
        named = {task.digest for task in refs}
        try:
            slot = self.pool.acquire(refs)
        except PoolExhausted:
            assert loaded(self.pool) == before
        except InvalidRequest:
            total = Counter[tuple[str, str]]()
            for task in refs:
                total[task.digest, task.task] += task.weight
            assert 0 in total.values()
        else:
            self.held.append((slot, refs))
            self.use(refs)
            self.check_evicted(before, [digest for digest in idle if digest not in named])
            if refs:
                assert self.pool.slots[slot].key == self.pool.task_key(refs)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.held))
        self.held.remove(entry)
        self.pool.release(entry[0])
        self.use(entry[1])

    @precondition(lambda self: self.pool.resident())
    @rule(data=st.data(), up=st.booleans())
    def pin(self, data: st.DataObject, up: bool) -> None:
        digest = data.draw(st.sampled_from(loaded(self.pool)))
        if up:
            self.pool.pin(digest)
            self.pins[digest] += 1
        elif self.pins[digest]:
            self.pool.unpin(digest)
            self.pins[digest] -= 1

    @precondition(lambda self: self.pool.resident())
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(loaded(self.pool)))
        if digest in self.idle():
            used = self.pool.used_bytes
            assert self.pool.unload(digest) == used - self.pool.used_bytes
        else:
            with pytest.raises(AdapterError, match="end its requests and unpin it first"):
                self.pool.unload(digest)

    @rule()
    def compact(self) -> None:
        self.pool.compact()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        row = st.sampled_from([*self.held, (BASE_SLOT, ())])
        check_outputs(self.pool, LIBRARY, data.draw(st.lists(row, min_size=1, max_size=12)))

    @invariant()
    def holds_together(self) -> None:
        self.pool.check_integrity()
        self.by_last_use = [d for d in self.by_last_use if self.pool.is_resident(d)]
        assert loaded(self.pool) == self.by_last_use
        assert {v.digest: (v.refs, v.pins) for v in self.pool.resident()} == {
            digest: (self.refs_of(digest), self.pins[digest]) for digest in loaded(self.pool)
        }


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=40)

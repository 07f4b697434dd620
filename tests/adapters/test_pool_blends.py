"""Slots of tasks and blends: who shares them, what they compute, how they are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.pool import Pool
from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import AdapterNotFound, InvalidRequest, PoolExhausted
from oneplusn.kernels.plan import BASE_SLOT
from pools import SHAPES, check_outputs, digests, load, loaded, lora, pool_of, ref
from random_bundles import make_bundle


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

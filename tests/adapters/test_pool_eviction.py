"""Who stays, who makes room, and what happens when there is none."""

from __future__ import annotations

import re

import pytest
import torch

from oneplusn.adapters.layout import page_image
from oneplusn.adapters.pool import Pool
from oneplusn.adapters.residents import Shortage
from oneplusn.errors import AdapterError, AdapterNotFound, PoolExhausted
from pools import SHAPES, SPECS, check_outputs, digests, load, loaded, lora, pool_of, ref
from random_bundles import make_bundle


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


def scattered_pool() -> tuple[Pool, list[tuple[int, tuple]], list]:
    """Four pages, the first and the third of them free, and a blend over the others."""
    pool = pool_of(4)
    a, b, c, d = (lora(seed) for seed in range(4))
    load(pool, a, b, c, d)
    blend = (ref(b, weight=2.0), ref(d))
    slots = [(pool.acquire(refs), refs) for refs in ((ref(b),), (ref(d),), blend)]
    pool.unload(a.digest)
    pool.unload(c.digest)
    return pool, slots, [b, d]


def test_compaction_joins_what_is_free() -> None:
    pool, slots, bundles = scattered_pool()
    long = page_image(lora(4, pages=2), SPECS, torch.float32)
    with pytest.raises(PoolExhausted, match="2 of 4 are free, 1 of them in one piece"):
        pool.reserve(long)
    assert pool.shortage(long) is Shortage.SCATTERED

    for _ in pool.compact():
        pool.check_integrity()
        check_outputs(pool, bundles, slots)
    assert sum(pool.compact()) == 0
    reservation = pool.reserve(long)
    pool.abort(reservation)


def test_a_load_compacts_where_that_helps() -> None:
    pool, slots, bundles = scattered_pool()
    load(pool, long := lora(4, pages=2))
    slots.append((pool.acquire([ref(long)]), (ref(long),)))
    check_outputs(pool, [*bundles, long], slots)
    pool.check_integrity()


def test_room_is_made_by_eviction_and_then_by_moving() -> None:
    pool = pool_of(3)
    idle, used, other = (lora(seed) for seed in range(3))
    load(pool, idle, used, other)
    slot = pool.acquire([ref(used)])
    evicted = []
    pool.on_evict = lambda digest, num_bytes: evicted.append((digest, num_bytes))
    long = lora(4, pages=2)
    size = page_image(idle, SPECS, torch.float32).num_bytes
    load(pool, long)
    assert evicted == [(idle.digest, size), (other.digest, size)]
    check_outputs(
        pool, [used, long], [(slot, (ref(used),)), (pool.acquire([ref(long)]), (ref(long),))]
    )
    pool.check_integrity()


def test_a_shortage_lasts_when_only_pins_could_end_it() -> None:
    pool = pool_of(3)
    a, b, c = (lora(seed) for seed in range(3))
    load(pool, a, b, c)
    slots = [pool.acquire([ref(a)]), pool.acquire([ref(b, weight=0.5), ref(c)])]
    images = {pages: page_image(lora(3, pages), SPECS, torch.float32) for pages in (1, 3, 4)}
    assert pool.shortage(images[1]) is Shortage.IN_USE
    assert pool.shortage(images[3]) is Shortage.IN_USE
    assert pool.shortage(images[4]) is Shortage.LASTING
    pool.pin(c.digest)
    assert pool.shortage(images[1]) is Shortage.IN_USE
    assert pool.shortage(images[3]) is Shortage.LASTING
    for slot in slots:
        pool.release(slot)
    assert pool.shortage(images[1]) is Shortage.SCATTERED

"""How a version comes into the pool: in pieces, whole, or not at all."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from oneplusn.adapters.layout import page_image
from oneplusn.adapters.pool import Pool
from oneplusn.errors import (
    AdapterExists,
    AdapterIncompatible,
    AdapterNotFound,
    MemoryPlanRefused,
    PoolExhausted,
)
from oneplusn.kernels.plan import BASE_SLOT, SiteSpec, build_plan
from pools import SHAPES, SPECS, check_outputs, digests, load, loaded, lora, pool_of, ref
from random_bundles import make_bundle, shapes_of


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
    own = sum(t.nbytes for table in tables for t in (table.gate_first, table.run_first))
    table_bytes = own + tables[0].gates.nbytes
    assert 0.25 * (1 << 20) < pool.num_bytes < (1 << 20) - table_bytes


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

    # The pages of either site, then the gates of either task.
    assert len(pieces) == 4
    assert sum(pieces[:2]) == image.num_bytes
    assert loaded(pool) == digests(bundle)
    slots = [(pool.acquire([task]), (task,)) for task in (ref(bundle), ref(bundle, "t1"))]
    check_outputs(pool, [bundle], [*slots, (BASE_SLOT, ())])


@pytest.mark.parametrize("num_pieces", [0, 1, 2, 3])
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


def test_a_long_run_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oneplusn.adapters.storage.PIECE_BYTES", 4096)
    pool, bundle = pool_of(9), lora(1, pages=9)
    reservation = pool.reserve(page_image(bundle, SPECS, torch.float32))
    pieces = list(pool.write(reservation))
    # A page takes 1664 bytes at q+k+v and 512 at down, so 2 and 8 of them go at a time.
    assert pieces[:7] == [3328, 3328, 3328, 3328, 1664, 4096, 512]
    pool.publish(reservation)
    slot = pool.acquire([ref(bundle)])
    check_outputs(pool, [bundle], [(slot, (ref(bundle),))])
    pool.check_integrity()


def test_no_plan_sees_a_version_before_it_is_published() -> None:
    pool, a, b = pool_of(4), lora(1), lora(2)
    load(pool, a)
    slot = pool.acquire([ref(a)])
    reservation = pool.reserve(page_image(b, SPECS, torch.float32))
    hidden = set(reservation.version.slots.values())
    tables = [
        (table.run_rows.clone(), table.gate_first.clone())
        for table in (site.table for site in pool.sites.values())
    ]
    for _ in pool.write(reservation):
        check_outputs(pool, [a], [(slot, (ref(a),)), (BASE_SLOT, ())])
        assert hidden.isdisjoint(pool.slots)
        with pytest.raises(KeyError):
            build_plan(list(hidden), pool.slots)
    for (rows, first), site in zip(tables, pool.sites.values(), strict=True):
        assert torch.equal(site.table.run_rows, rows)
        assert torch.equal(site.table.gate_first, first)
    pool.publish(reservation)
    check_outputs(pool, [a, b], [(slot, (ref(a),)), (pool.acquire([ref(b)]), (ref(b),))])


def test_what_is_being_written_moves_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oneplusn.adapters.storage.PIECE_BYTES", 1)
    pool, a, b = pool_of(4), lora(1), lora(2, pages=2)
    load(pool, a)
    reservation = pool.reserve(page_image(b, SPECS, torch.float32))
    writer = pool.write(reservation)
    next(writer)
    pool.unload(a.digest)
    for _ in pool.compact():
        pool.check_integrity()
    for _ in writer:
        pool.check_integrity()
    pool.publish(reservation)
    check_outputs(pool, [b], [(pool.acquire([ref(b)]), (ref(b),))])
    pool.check_integrity()


OTHER = SiteSpec("l.0.up", 6, (4,), ("l.0.up",))
NARROW = SiteSpec("l.0.q+k+v", 5, (4, 2, 2), ("l.0.q", "l.0.k", "l.0.v"))


@pytest.mark.parametrize(
    ("specs", "dtype", "words"),
    [
        pytest.param((*SPECS, OTHER), torch.float32, "l.0.up is not among this", id="site"),
        pytest.param(SPECS[::-1], torch.float32, "or not in its place", id="order"),
        pytest.param((NARROW,), torch.float32, "this base takes [1, 3, 16, 6]", id="shape"),
        pytest.param(SPECS, torch.bfloat16, "of torch.bfloat16 at l.0.q+k+v", id="dtype"),
    ],
)
def test_an_image_for_another_base_is_refused(specs, dtype, words: str) -> None:
    pool = pool_of(4)
    image = page_image(make_bundle(shapes_of(specs), seed=1), specs, dtype)
    with pytest.raises(AdapterIncompatible, match=re.escape(words)):
        pool.reserve(image)
    assert pool.used_bytes == 0
    pool.check_integrity()


def test_an_image_with_too_few_gates_is_refused_and_leaves_nothing() -> None:
    pool, image = pool_of(4), page_image(lora(1), SPECS, torch.float32)
    site = image.sites["l.0.down"]
    short = replace(site, gates={"t0": tuple(gates[:-1] for gates in site.gates["t0"])})
    reservation = pool.reserve(replace(image, sites={**image.sites, "l.0.down": short}))
    with pytest.raises(AdapterIncompatible, match="31 gates of 't0' for 32 rank rows"):
        list(pool.write(reservation))
    pool.abort(reservation)
    assert pool.used_bytes == 0
    pool.check_integrity()


def test_a_model_that_adapters_cannot_reach_has_no_room_for_any() -> None:
    pool = Pool((), memory_bytes=0, dtype=torch.float32)
    assert (pool.num_bytes, pool.used_bytes, pool.resident()) == (0, 0, [])
    assert pool.acquire([]) == BASE_SLOT
    with pytest.raises(AdapterIncompatible, match="not among this one's 0 sites"):
        load(pool, lora(1))
    pool.check_integrity()


def test_a_version_that_cannot_fit_is_refused_at_once() -> None:
    pool = pool_of(2)
    with pytest.raises(PoolExhausted, match="takes 3 pages"):
        load(pool, lora(1, pages=3))
    pool.check_integrity()

"""A pool under anything in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from oneplusn.adapters.layout import page_image
from oneplusn.adapters.pool import Reservation
from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.residents import Shortage
from oneplusn.errors import AdapterError, AdapterExists, InvalidRequest, PoolExhausted
from oneplusn.kernels.plan import BASE_SLOT
from pools import SHAPES, SPECS, Refs, check_outputs, loaded, pool_of, ref
from random_bundles import make_bundle

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

    @rule(pieces=st.integers(1, 2))
    def compact(self, pieces: int) -> None:
        for _, _ in zip(range(pieces), self.pool.compact(), strict=False):
            self.pool.check_integrity()

    @rule(index=st.integers(0, len(LIBRARY) - 1))
    def load_at_once(self, index: int) -> None:
        image, before, idle = IMAGES[index], loaded(self.pool), self.idle()
        if any(reservation.image is image for reservation, _ in self.writing):
            return
        there = self.pool.is_resident(image.digest)
        try:
            self.pool.load(image)
        except PoolExhausted:
            assert loaded(self.pool) == before
            assert self.pool.shortage(image) is not Shortage.SCATTERED
        else:
            if not there:
                self.by_last_use.append(image.digest)
            self.check_evicted(before, idle)

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

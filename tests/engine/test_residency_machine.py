"""An engine under loads, unloads, requests and cancels in any order, as the API would see it."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from driven_engines import Clock, Driven, ask, begin, driven, lora
from oneplusn.adapters.bundle import Bundle
from oneplusn.errors import AdapterNotFound, PoolExhausted
from oneplusn.server.messages import Freed

LIBRARY = (lora(1), lora(2), lora(3, tasks=("t", "u")), lora(4, pages=2), lora(5, pages=3))
LENGTH = 5
NUMBERS = st.integers(0, len(LIBRARY) - 1)
pytestmark = pytest.mark.usefixtures("small_pieces")


@cache
def answer(bundles: tuple[Bundle, ...]) -> list[int]:
    """What these answer alone."""
    engine = driven(resident=bundles)
    ask(engine, "x", *bundles, max_tokens=LENGTH)
    engine.finish()
    return engine.tokens("x")


class Traffic(RuleBasedStateMachine):
    """Keeps what the API knows beside the engine: from its messages and its events alone."""

    @initialize(pages=st.integers(3, 6), max_adapters=st.sampled_from((None, 1, 2)))
    def start(self, pages: int, max_adapters: int | None) -> None:
        self.clock = Clock()
        limits = {"max_num_seqs": 3, "max_adapters": max_adapters, "clock": self.clock}
        self.run: Driven = driven(pages, **limits)
        self.resident = set[str]()
        self.loads = set[str]()
        self.pinned = set[str]()
        self.unloads = set[str]()
        self.seen = 0
        self.asked: dict[str, tuple[Bundle, ...]] = {}
        self.over = set[str]()
        self.timed = set[str]()

    @rule(number=NUMBERS, pin=st.booleans())
    def load(self, number: int, pin: bool) -> None:
        bundle = LIBRARY[number]
        pin = pin and number == 0
        begin(self.run, bundle, pin=pin)
        self.loads.add(bundle.digest)
        self.pin(bundle, pin)
        self.listen()

    @rule(number=NUMBERS)
    def keep(self, number: int) -> None:
        bundle = LIBRARY[number]
        here = bundle.digest in self.resident | self.loads
        assert self.run.engine.keep(bundle.digest) is here
        if here:
            self.loads.add(bundle.digest)
        self.listen()

    @rule(number=NUMBERS, force=st.booleans())
    def unload(self, number: int, force: bool) -> None:
        bundle = LIBRARY[number]
        self.run.engine.unload(bundle.digest, force=force)
        self.unloads.add(bundle.digest)
        self.pin(bundle, False)
        self.listen()
        if force:
            assert bundle.digest not in self.unloads | self.resident | self.loads

    @rule(
        numbers=st.lists(NUMBERS, max_size=2, unique=True),
        timeout=st.sampled_from((None, None, 2.0)),
    )
    def submit(self, numbers: list[int], timeout: float | None) -> None:
        name, bundles = str(len(self.asked)), tuple(LIBRARY[number] for number in numbers)
        needs = {bundle.digest for bundle in bundles}
        if needs - (self.resident | self.loads) or needs & self.unloads:
            with pytest.raises(AdapterNotFound) as refused:
                ask(self.run, name, *bundles)
            assert refused.value.code == "adapter_not_resident"
            return
        with suppress(PoolExhausted):
            ask(self.run, name, *bundles, max_tokens=LENGTH, timeout=timeout)
            self.asked[name] = bundles
            if timeout is not None:
                self.timed.add(name)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.run.engine.cancel(name)
        self.over.add(name)
        self.listen()

    @rule(count=st.integers(1, 4), write=st.booleans())
    def turns(self, count: int, write: bool) -> None:
        for _ in range(count):
            self.run.turn(write=write)
            self.listen()

    @rule()
    def write_all(self) -> None:
        self.run.engine.write_some(60.0)
        self.listen()

    @rule()
    def pass_time(self) -> None:
        self.clock.now += 1.0

    def pin(self, bundle: Bundle, pin: bool) -> None:
        """What the last load of a version says, until it is unloaded."""
        self.pinned.discard(bundle.digest)
        self.pinned.update({bundle.digest} if pin else ())

    def listen(self) -> None:
        """Take the events in, as the API does."""
        self.run.events += self.run.engine.poll()
        for event in self.run.events[self.seen :]:
            if isinstance(event, Freed):
                took_back = event.digest in self.resident and event.num_bytes == 0
                assert took_back or event.digest not in self.pinned, "a pinned version was evicted"
                self.unloads.discard(event.digest)
                self.resident.discard(event.digest)
            else:
                self.loads.discard(event.digest)
                if event.error is None:
                    self.resident.add(event.digest)
                else:
                    self.pinned.discard(event.digest)
        self.seen = len(self.run.events)

    @invariant()
    def engine_and_api_agree(self) -> None:
        self.run.engine.scheduler.check_integrity()
        self.run.engine.residency.check_integrity()
        assert self.resident == set(self.run.engine.stats.resident)
        assert self.run.engine.is_writing <= bool(self.loads)

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        self.run.finish()
        self.listen()
        assert not self.loads | self.unloads
        for name, bundles in self.asked.items():
            self.check_end(name, bundles)
        for bundle in LIBRARY:
            self.run.engine.unload(bundle.digest)
        stats = self.run.engine.stats
        assert (stats.resident, stats.pool_used_bytes) == ([], 0)
        assert stats.kv_blocks_free == stats.kv_blocks

    def check_end(self, name: str, bundles: tuple[Bundle, ...]) -> None:
        """Every request has ended once, and what it got is its own."""
        outputs = self.run.outputs.get(name, [])
        tokens = [output.token for output in outputs if output.token is not None]
        assert tokens == answer(bundles)[: len(tokens)]
        ends = [output.finish for output in outputs if output.finish is not None]
        ends += ["refused"] * (name in self.run.refused)
        if name not in self.over:
            assert len(ends) == 1
        assert len(ends) <= 1
        assert (len(tokens) == LENGTH) == (ends == ["length"])
        if ends == ["timeout"]:
            assert name in self.timed


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=20, stateful_step_count=40)

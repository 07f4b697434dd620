"""The ticket protocol: right in every interleaving drawn, and every planted bug is caught.

`pytest -rP` shows the counts; a failure names the seed that shows it again.
"""

from __future__ import annotations

import random
import sys
from collections import Counter

import pytest

from ticket_model import (
    ACQ_REL,
    ACQUIRE,
    ARRIVALS,
    BEFORE_LAUNCH,
    DONE,
    FLAGS,
    RELAXED,
    RELEASE,
    TICKET,
    Kernel,
    Memory,
    Program,
    Violation,
    interleave,
    launch,
    lay_out,
)

GRIDS = (1, 2, 3, 7, 64)
LAUNCHES = 20_000  # for each grid, two for each seed: 100,000 interleavings in all
HUNT = 1_000  # seeds tried for each planted bug, a fifth on each grid


@pytest.fixture
def report(record_property):
    def write(**figures: object) -> None:
        for name, figure in figures.items():
            record_property(name, figure)
        sys.stdout.write(", ".join(f"{name} {figure}" for name, figure in figures.items()) + "\n")

    return write


@pytest.mark.parametrize("grid", GRIDS)
def test_protocol_survives_random_interleavings(grid, report):
    residents: set[int] = set()
    steps = 0
    for seed in range(grid * 1_000_000, grid * 1_000_000 + LAUNCHES // 2):
        try:
            launches = interleave(Kernel, grid, seed)
        except Violation as violation:
            pytest.fail(f"interleave(Kernel, {grid}, {seed}): {violation}")
        residents.update(count for count, _ in launches)
        steps += sum(operations for _, operations in launches)
    assert residents == set(range(1, grid + 1))
    report(grid=grid, interleavings=LAUNCHES, memory_operations=steps)


@pytest.mark.parametrize("residents", [1, 2, 64])
def test_protocol_survives_the_largest_work(residents):
    rng = random.Random(residents)
    memory = Memory(rng)
    for number in range(20):
        work = lay_out(number, [3, 3, 3, 3], 4, [3, 3, 3])
        launch(Kernel(work, 64), memory, residents, rng)


class FlagRelaxed(Kernel):
    """Raises the flag without publishing H."""

    raise_order = RELAXED


class FlagBeforeH(Kernel):
    """Raises the flag before H is stored."""

    def hand_over(self, me, chunk, h):
        me.add(chunk.flag, 1, self.raise_order)
        yield None
        me.store(chunk.h, h)
        yield None


class WaitRelaxed(Kernel):
    """Sees the flag, but may read an H from before."""

    wait_order = RELAXED


class ArrivalRelaxed(Kernel):
    """Arrives without publishing its plane, and sums without acquiring those of the others."""

    arrive_order = RELAXED


class ArrivalReleaseOnly(Kernel):
    """Sums planes that were published, but that it has not acquired."""

    arrive_order = RELEASE


class ArrivalAcquireOnly(Kernel):
    """Arrives without publishing its plane."""

    arrive_order = ACQUIRE


class OwnPlaneFirst(Kernel):
    """Adds the other planes to the one at hand, so the order is that of the arrivals."""

    def sum_planes(self, me, planes, split):
        own_first = (planes[split], *planes[:split], *planes[split + 1 :])
        return (yield from super().sum_planes(me, own_first, split))


class ArrivalsKept(Kernel):
    """Leaves the arrivals of a chunk as they are."""

    def reset_arrivals(self, me, chunk):
        yield from ()


class ExpandFirst(Kernel):
    """Hands out the items that wait before those that they wait for."""

    def in_ticket_order(self):
        return [*self.work.expands, *self.work.shrinks]


class LastWorkerResets(Kernel):
    """Restores the rest state when the last item is done, though programs may still come."""

    def process(self, me, item):
        yield from super().process(me, item)
        done = me.add(DONE, 1, ACQ_REL)
        yield None
        if done == len(self.items) - 1:
            yield from self.rest(me)

    def leave(self, me):
        yield from ()


class OutBeforeLastItem(Kernel):
    """Counts itself out once its next ticket is past the end, before it works on the last one."""

    def program(self, me):
        ticket = me.add(TICKET, 1, RELAXED)
        yield None
        if ticket >= len(self.items):
            yield from self.leave(me)
        while ticket < len(self.items):
            upcoming = me.add(TICKET, 1, RELAXED)
            yield None
            if upcoming >= len(self.items):
                yield from self.leave(me)
            yield from self.process(me, self.items[ticket])
            ticket = upcoming


class LeaveRelaxed(Kernel):
    """The last one out zeroes words that others' atomics have not been ordered before."""

    leave_order = RELAXED


BUGS = {
    FlagRelaxed: "value",
    FlagBeforeH: "value",
    WaitRelaxed: "value",
    ArrivalRelaxed: "value",
    ArrivalReleaseOnly: "value",
    ArrivalAcquireOnly: "value",
    OwnPlaneFirst: "value",
    ArrivalsKept: "rest",
    ExpandFirst: "deadlock",
    LastWorkerResets: "writes",
    OutBeforeLastItem: "deadlock",
    LeaveRelaxed: "race",
}


@pytest.mark.parametrize(("bug", "kind"), BUGS.items(), ids=[bug.__name__ for bug in BUGS])
def test_planted_bug_is_caught(bug, kind, report):
    caught: Counter[str] = Counter()
    first = None
    for seed in range(HUNT):
        try:
            interleave(bug, GRIDS[seed % len(GRIDS)], seed)
        except Violation as violation:
            caught[violation.kind] += 1
            if violation.kind == kind and first is None:
                first = seed + 1
    assert first is not None
    report(bug=bug.__name__, caught_after=first, caught=dict(caught), of=HUNT)


@pytest.mark.parametrize(
    ("word", "kind"),
    [(TICKET, "deadlock"), (DONE, "rest"), (FLAGS, "value"), (ARRIVALS, "value")],
    ids=["ticket", "out", "flag", "arrivals"],
)
def test_word_not_at_rest_spoils_the_next_launch(word, kind):
    kinds = set()
    for seed in range(50):
        rng = random.Random(seed)
        memory = Memory(rng)
        memory.words[word] = 1
        try:
            launch(Kernel(lay_out(1, [2], 2, [1]), 2), memory, 2, rng)
        except Violation as violation:
            kinds.add(violation.kind)
    assert kind in kinds


def test_h_of_the_launch_before_shows():
    seen = set()
    for seed in range(50):
        rng = random.Random(seed)
        memory = Memory(rng)
        launch(Kernel(lay_out(1, [1], 1, [1]), 2), memory, 2, rng)
        try:
            launch(WaitRelaxed(lay_out(2, [1], 1, [1]), 2), memory, 2, rng)
        except Violation:
            seen.add(memory.cells["y", 0, 0, 0][-1][1])
    base = (2, "base", 0, 0, 0)
    assert seen == {(base, ((1, 0, 0, 0),))}


A, B, C = 0, 1, 2
OLD_OR_NEW = {"old", "new"}
# What the reader may see after A has stored and these atomics have run, one after the other.
ORDERS = {
    "release, acquire": ([(A, FLAGS, RELEASE), (B, FLAGS, ACQUIRE)], B, {"new"}),
    "relaxed, acquire": ([(A, FLAGS, RELAXED), (B, FLAGS, ACQUIRE)], B, OLD_OR_NEW),
    "acquire, acquire": ([(A, FLAGS, ACQUIRE), (B, FLAGS, ACQUIRE)], B, OLD_OR_NEW),
    "release, relaxed": ([(A, FLAGS, RELEASE), (B, FLAGS, RELAXED)], B, OLD_OR_NEW),
    "release, release": ([(A, FLAGS, RELEASE), (B, FLAGS, RELEASE)], B, OLD_OR_NEW),
    "too early": ([(B, FLAGS, ACQUIRE), (A, FLAGS, RELEASE)], B, OLD_OR_NEW),
    "another word": ([(A, FLAGS, RELEASE), (B, DONE, ACQUIRE)], B, OLD_OR_NEW),
    "own store": ([(A, FLAGS, RELAXED)], A, {"new"}),
    "handed on": (
        [(A, FLAGS, RELEASE), (B, FLAGS, ACQ_REL), (B, DONE, RELEASE), (C, DONE, ACQUIRE)],
        C,
        {"new"},
    ),
    "through a relaxed atomic": (
        [(A, FLAGS, RELEASE), (B, FLAGS, RELAXED), (C, FLAGS, ACQUIRE)],
        C,
        {"new"},
    ),
}


@pytest.mark.parametrize(("atomics", "reader", "seen"), ORDERS.values(), ids=ORDERS)
def test_memory_keeps_no_order_but_the_one_asked_for(atomics, reader, seen):
    cell = ("h", 0, 0, 0)
    values = set()
    for seed in range(50):
        memory = Memory(random.Random(seed))
        memory.cells[cell] = [(BEFORE_LAUNCH, "old")]
        programs = [Program(memory) for _ in (A, B, C)]
        programs[A].store(cell, "new")
        for program, word, order in atomics:
            programs[program].add(word, 1, order)
        values.add(programs[reader].load(cell))
    assert values == seen

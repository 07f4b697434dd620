"""The ticket protocol of the one-launch delta kernel, run at random under a weak memory.

The kernel hands out work by tickets: first the shrink items (chunk, slice, K split), then the
expand items (tile, column block). Nothing but the order of its memory operations makes that right,
and an interpreter that runs one program after the other cannot show it wrong. This model can:
`Kernel` is the protocol with one `yield` after each memory operation, `launch` picks at random
which program goes on, `Memory` answers plain loads with whatever the orders asked for leave open.

What the memory promises, and no more:

* Each location has one order of writes. An atomic acts on its newest value, at once.
* Every write carries a mark (one bit), and a program *knows* the marks of its own writes, and of
  all that was written before the launch. A releasing atomic leaves all that its program knows at
  the word; an acquiring atomic learns what has been left there. A relaxed one does neither, but
  what others left at the word stays (a release sequence).
* A plain load returns, at random, any value that the word has held since the newest write that
  the program knows: an unpublished store may be seen, or not; a published one may still be
  missed by who has not acquired it.
* A plain store to a control word and an atomic on it must be ordered by what the programs know.
  If they are not, either may come first: the model goes on and reports a race.
* The end of a launch makes everything known to the next.

A program is one thread here, which never runs ahead of its own atomics. The barriers among the
threads of a block, and what a compiler moves, are outside the model.

At most `residents` programs run at a time, as on a device; the next starts when one ends. Every
part a shrink item writes is different from all others of both launches, a sum is the tuple of its
parts, in order, and buffers keep what the launch before left. So a value that is missing, stale,
foreign, doubled or added in another order shows.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

RELAXED, ACQUIRE, RELEASE, ACQ_REL = 0, 1, 2, 3  # a sum of bits: what it learns, what it leaves

MAX_TILES, MAX_CHUNKS, MAX_SLICES, MAX_SPLITS, MAX_BLOCKS = 4, 3, 3, 4, 3  # chunks of one tile
TICKET, DONE, FLAGS = 0, 1, 2
ARRIVALS = FLAGS + MAX_TILES * MAX_SLICES
CONTROL_WORDS = ARRIVALS + MAX_TILES * MAX_CHUNKS * MAX_SLICES

BEFORE_LAUNCH = 1  # the mark of all that was written before the launch
WAITS = True  # what a program yields when it polled in vain
STEP_LIMIT = 100_000  # a right launch takes about a thousand at most
BURSTS = (0.0, 0.5, 0.9)  # probabilities that the program that went last goes on

Cell = tuple[str, int, int, int]
Steps = Iterator[bool | None]
Sum = Generator[bool | None, None, tuple[object, ...]]


class Violation(Exception):
    """What the protocol must not do; `kind` is one word for it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Memory:
    """Data cells with all their versions, and control words, which only atomics read.

    Attributes:
        cells: (mark, value) of each write since the launch began, after the value it began with.
        words: newest value of each control word.
        newest: mark of the newest write to each control word.
        stored: mark of the newest plain store to each control word.
        left: marks that releases have left at each control word.
        race: the first race seen, if any.
    """

    def __init__(self, rng: random.Random) -> None:
        self.random = rng.random
        self.cells: dict[Cell, list[tuple[int, Any]]] = {}
        self.words = [0] * CONTROL_WORDS
        self.settle()

    def settle(self) -> None:
        """Make all that has been written known to everyone, as the end of a launch does."""
        for cell, versions in self.cells.items():
            self.cells[cell] = [(BEFORE_LAUNCH, versions[-1][1])]
        self.newest = [BEFORE_LAUNCH] * CONTROL_WORDS
        self.stored = [BEFORE_LAUNCH] * CONTROL_WORDS
        self.left = [0] * CONTROL_WORDS
        self.mark = BEFORE_LAUNCH
        self.race = ""


class Program:
    """One program's window on the memory: `knows` holds the marks that it must not miss."""

    __slots__ = ("knows", "memory")

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.knows = BEFORE_LAUNCH

    def _mark(self) -> int:
        self.memory.mark <<= 1
        self.knows |= self.memory.mark
        return self.memory.mark

    def store(self, cell: Cell, value: object) -> None:
        """Write a data cell."""
        self.memory.cells[cell].append((self._mark(), value))

    def load(self, cell: Cell) -> Any:
        """Read a data cell: the newest version known, or any later one."""
        versions = self.memory.cells[cell]
        last = known = len(versions) - 1
        while not versions[known][0] & self.knows:
            known -= 1
        if known < last:
            known += int(self.memory.random() * (last - known + 1))
        return versions[known][1]

    def add(self, word: int, n: int, order: int) -> int:
        """Add `n` to a control word (0 is a poll), and return what it was."""
        memory = self.memory
        if order & ACQUIRE:
            self.knows |= memory.left[word]
        if not memory.stored[word] & self.knows:
            memory.race = memory.race or f"an atomic on word {word} and the store of a zero there"
        memory.newest[word] = self._mark()
        if order & RELEASE:
            memory.left[word] |= self.knows
        memory.words[word] += n
        return memory.words[word] - n

    def zero(self, word: int) -> None:
        """Set a control word to zero by a plain store."""
        memory = self.memory
        if not memory.newest[word] & self.knows:
            memory.race = memory.race or f"the store of a zero in word {word} and an atomic on it"
        memory.newest[word] = memory.stored[word] = self._mark()
        memory.left[word] = 0
        memory.words[word] = 0


class Chunk(NamedTuple):
    """A chunk in one slice: a cell and a part for each K split, the cell of H, two words."""

    planes: tuple[Cell, ...]
    parts: tuple[object, ...]
    h: Cell
    arrivals: int
    flag: int


class Shrink(NamedTuple):
    """A shrink item."""

    chunk: Chunk
    split: int


class Expand(NamedTuple):
    """An expand item: its cell of y, and the cells of H of its tile and slice."""

    y: Cell
    hs: tuple[Cell, ...]
    flag: int


class Work(NamedTuple):
    """One launch's items, what y holds before, and every cell that is written, with its value."""

    shrinks: list[Shrink]
    expands: list[Expand]
    flags: range
    before: dict[Cell, object]
    after: dict[Cell, object]


def lay_out(number: int, tile_chunks: list[int], splits: int, slice_blocks: list[int]) -> Work:
    """Lay out launch `number`: chunks of each tile, K splits, column blocks of each slice."""
    slices = len(slice_blocks)
    flags = range(FLAGS, FLAGS + len(tile_chunks) * slices)
    work = Work([], [], flags, {}, {})
    for tile, count in enumerate(tile_chunks):
        first = sum(tile_chunks[:tile])
        for s, blocks in enumerate(slice_blocks):
            flag = FLAGS + tile * slices + s
            chunks = []
            for c in range(first, first + count):
                planes = tuple(("plane", c, s, split) for split in range(splits))
                parts = tuple((number, c, s, split) for split in range(splits))
                chunk = Chunk(planes, parts, ("h", c, s, 0), ARRIVALS + c * slices + s, flag)
                chunks.append(chunk)
                work.shrinks.extend(Shrink(chunk, split) for split in range(splits))
                if splits > 1:
                    work.after.update(zip(planes, parts, strict=True))
                work.after[chunk.h] = parts
            hs = tuple(chunk.h for chunk in chunks)
            for block in range(blocks):
                y = ("y", tile, s, block)
                work.expands.append(Expand(y, hs, flag))
                work.before[y] = base = (number, "base", tile, s, block)
                work.after[y] = (base, *(chunk.parts for chunk in chunks))
    return work


def draw_work(number: int, rng: random.Random) -> Work:
    """Draw the shape of launch `number`, and lay it out."""
    tile_chunks = [rng.randint(0, MAX_CHUNKS) for _ in range(rng.randint(0, MAX_TILES))]
    slice_blocks = [rng.randint(1, MAX_BLOCKS) for _ in range(rng.randint(1, MAX_SLICES))]
    return lay_out(number, tile_chunks, rng.randint(1, MAX_SPLITS), slice_blocks)


class Kernel:
    """The protocol. A planted bug is a subclass that overrides an order or a step."""

    arrive_order = ACQ_REL
    raise_order = RELEASE
    wait_order = ACQUIRE
    leave_order = ACQ_REL

    def __init__(self, work: Work, grid: int) -> None:
        self.work = work
        self.grid = grid
        self.items = self.in_ticket_order()

    def in_ticket_order(self) -> list[Shrink | Expand]:
        """List the items as the tickets hand them out: who waits has a later ticket."""
        return [*self.work.shrinks, *self.work.expands]

    def program(self, me: Program) -> Steps:
        """Work until the tickets are used up; the next is taken before the work on this one."""
        ticket = me.add(TICKET, 1, RELAXED)
        yield None
        while ticket < len(self.items):
            upcoming = me.add(TICKET, 1, RELAXED)
            yield None
            yield from self.process(me, self.items[ticket])
            ticket = upcoming
        yield from self.leave(me)

    def process(self, me: Program, item: Shrink | Expand) -> Steps:
        """Work on one item."""
        return self.shrink(me, *item) if type(item) is Shrink else self.expand(me, *item)

    def shrink(self, me: Program, chunk: Chunk, split: int) -> Steps:
        """Write a plane and arrive; the last to arrive sums the planes and hands H over."""
        h = chunk.parts
        if len(chunk.planes) > 1:
            me.store(chunk.planes[split], chunk.parts[split])
            yield None
            arrived = me.add(chunk.arrivals, 1, self.arrive_order)
            yield None
            if arrived < len(chunk.planes) - 1:
                return
            h = yield from self.sum_planes(me, chunk.planes, split)
            yield from self.reset_arrivals(me, chunk)
        yield from self.hand_over(me, chunk, h)

    def sum_planes(self, me: Program, planes: tuple[Cell, ...], split: int) -> Sum:
        """Sum the planes in their order, whichever `split` came last."""
        parts = []
        for plane in planes:
            parts.append(me.load(plane))
            yield None
        return tuple(parts)

    def reset_arrivals(self, me: Program, chunk: Chunk) -> Steps:
        """Bring the chunk's arrivals back to zero."""
        me.zero(chunk.arrivals)
        yield None

    def hand_over(self, me: Program, chunk: Chunk, h: object) -> Steps:
        """Store H, then count the flag of tile and slice up."""
        me.store(chunk.h, h)
        yield None
        me.add(chunk.flag, 1, self.raise_order)
        yield None

    def expand(self, me: Program, y: Cell, hs: tuple[Cell, ...], flag: int) -> Steps:
        """Load y, wait for all chunks of the tile in this slice, add them, store y."""
        total = [me.load(y)]
        yield None
        while me.add(flag, 0, self.wait_order) < len(hs):
            yield WAITS
        yield None
        for h in hs:
            total.append(me.load(h))
            yield None
        me.store(y, tuple(total))
        yield None

    def leave(self, me: Program) -> Steps:
        """Count this program out; the last one out restores the rest state."""
        left = me.add(DONE, 1, self.leave_order)
        yield None
        if left == self.grid - 1:
            yield from self.rest(me)

    def rest(self, me: Program) -> Steps:
        """Zero the flags, the ticket and the count of programs out."""
        for word in (*self.work.flags, TICKET, DONE):
            me.zero(word)
            yield None


def launch(kernel: Kernel, memory: Memory, residents: int, rng: random.Random) -> int:
    """Run one launch, at most `residents` programs at a time, and check what it left.

    Returns:
        The number of memory operations.

    Raises:
        Violation: if it ends wrong, or not at all.
    """
    memory.settle()
    for cell in kernel.work.after:
        memory.cells.setdefault(cell, [(BEFORE_LAUNCH, "poison")])
    for cell, value in kernel.work.before.items():
        memory.cells[cell] = [(BEFORE_LAUNCH, value)]
    steps = run_programs(kernel, memory, residents, rng)
    check(kernel.work, memory)
    return steps


def run_programs(kernel: Kernel, memory: Memory, residents: int, rng: random.Random) -> int:
    """Run all programs of the grid in a random interleaving; return the number of steps."""
    running = [kernel.program(Program(memory)) for _ in range(residents)]
    to_start = kernel.grid - residents
    keep, again = rng.choice(BURSTS), 0.0
    stuck: set[int] = set()  # who polled in vain since anyone did something else
    pick = 0
    for step in range(STEP_LIMIT):
        draw = rng.random()
        if draw >= again:  # then (draw - again) / (1 - again) is uniform
            pick = int((draw - again) / (1 - again) * len(running))
        again = keep
        state = next(running[pick], "ended")
        if state is None:
            if stuck:
                stuck.clear()
            continue
        again = 0.0
        if state is WAITS:
            stuck.add(pick)
            if len(stuck) == len(running):
                raise Violation("deadlock", f"all {len(running)} resident programs wait")
            continue
        stuck.clear()
        if to_start:
            running[pick] = kernel.program(Program(memory))
            to_start -= 1
        else:
            running[pick] = running[-1]
            running.pop()
            if not running:
                return step + 1 - kernel.grid  # the end of a program is no memory operation
    raise Violation("endless", f"still running after {STEP_LIMIT} steps")


def check(work: Work, memory: Memory) -> None:
    """Check that each cell was written once and right, the rest state, and that nothing raced."""
    for cell, value in work.after.items():
        versions = memory.cells[cell]
        if len(versions) != 2:
            raise Violation("writes", f"{cell} was written {len(versions) - 1} times")
        if versions[1][1] != value:
            raise Violation("value", f"{cell} holds {versions[1][1]}, expected {value}")
    if any(memory.words):
        raise Violation("rest", f"control words are {memory.words} after the launch")
    if memory.race:
        raise Violation("race", memory.race)


def interleave(kernel: type[Kernel], grid: int, seed: int) -> list[tuple[int, int]]:
    """Run two launches in a row on the same memory, all drawn from `seed`.

    Returns:
        For each launch the resident programs, and the number of memory operations.

    Raises:
        Violation: if either goes wrong; the same seed shows it again.
    """
    rng = random.Random(seed)
    memory = Memory(rng)
    launches = []
    for number in (1, 2):
        residents = rng.randint(1, grid)
        running = kernel(draw_work(number, rng), grid)
        launches.append((residents, launch(running, memory, residents, rng)))
    return launches

"""Check in PTX that what one program leaves for another is complete before it is read.

Rank rows travel through device memory, from the program that shrinks to those that expand, and
as parts from split to split. One thread of a block raises or reads a counter, the others meet it
at a barrier: so a barrier lies between an access of the rows and that of the counter, and nothing
may slip to the wrong side of either.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Literal, NamedTuple

from oneplusn.kernels.ptx import UNKNOWN, Program

Handover = Literal["counter", "shrink", "expand", "none"]
"""How H is handed over: by a counter within one launch, or from one launch to the next."""

OUTPUTS = frozenset({"y0", "y1", "y2"})
_ENTRY = 0


class Rule(NamedTuple):
    """No path leads from a `start` to an `end` but through one of `through`.

    The three are names of sets of instructions, as `_marks` makes them; several are separated by
    blanks.
    """

    start: str
    end: str
    through: str
    fault: str


_TOUCHED = "memory in use is touched before the wait"
_PARTS = (
    Rule("entry tickets", "planes_loads", "arrivals", "a part is read before its split arrived"),
    Rule("arrivals", "planes_loads", "barriers", "parts are read by threads that saw no arrival"),
    Rule("planes_stores", "arrivals", "barriers", "a split arrives before all threads stored"),
    Rule("arrivals", "planes_stores", "tickets", "a part is stored after its split arrived"),
)
# By hand-over, and whether launches overlap (programmatic dependent launch).
RULES: dict[tuple[Handover, bool], tuple[Rule, ...]] = {
    ("counter", False): (
        Rule("entry tickets", "h_loads", "polls", "H is read without a wait for its flag"),
        Rule("polls", "h_loads", "barriers", "H is read by threads that saw no flag"),
        Rule("h_loads", "polls", "tickets", "H is read within the wait"),
        Rule("h_stores", "raises", "barriers", "the flag is raised before all threads stored H"),
        Rule("raises", "h_stores", "tickets", "H is stored after its flag is raised"),
        Rule("polls", "y_loads", "tickets", "y is read behind the wait, not beside the shrink"),
        *_PARTS,
    ),
    ("shrink", False): _PARTS,
    ("expand", False): (),
    ("none", False): (),
    ("shrink", True): (
        Rule("entry", "x_loads h_stores planes_stores arrivals", "waits", _TOUCHED),
        Rule("entry", "releases", "waits", "the next launch begins before the last has ended"),
        *_PARTS,
    ),
    ("expand", True): (
        Rule("entry", "h_loads y_stores", "waits", _TOUCHED),
        Rule("waits", "y_loads", "", "y is read behind the wait, not beside the shrink"),
    ),
}


def order_faults(
    program: Program, handover: Handover, *, splits: bool, adds: bool, pdl: bool = False
) -> list[str]:
    """Return what is wrong with the order of a kernel's accesses; nothing = it holds.

    Args:
        program: With the names that `triton_delta` gives to its arguments.
        handover: How H is handed over.
        pdl: Whether the launch overlaps with its neighbours.
        splits: Whether chunks are summed from parts, so that there must be accesses to parts.
        adds: Whether outputs are added to, so that there must be loads of them.
    """
    marks = _marks(program)
    absent = set() if splits else {"arrivals", "planes_loads", "planes_stores"}
    absent |= set() if adds else {"y_loads"}
    absent |= set() if handover == "counter" else {"tickets"}
    rules = RULES[handover, pdl]
    needed = {name for rule in rules for name in f"{rule.start} {rule.end}".split()} - absent
    faults = [f"no {name.replace('_', ' ')}" for name in sorted(needed) if not marks[name]]
    faults += [rule.fault for rule in rules if _breaks(program, marks, rule)]
    if rules and marks["unknown"]:
        faults.append("an address derives from no argument, so its order cannot be known")
    if marks["stale"]:
        faults.append("H or its parts are read through a cache that may hold what was there before")
    return faults


def _breaks(program: Program, marks: dict[str, Set[int]], rule: Rule) -> bool:
    start, end, through = (
        set[int]().union(*(marks[name] for name in names.split()))
        for names in (rule.start, rule.end, rule.through)
    )
    return not end.isdisjoint(program.after(start, without=through))


def _marks(program: Program) -> dict[str, Set[int]]:
    """Return the sets of instructions that rules speak of."""

    def where(
        *words: str, reads: Set[str] | None = None, writes: Set[str] | None = None
    ) -> set[int]:
        return {
            i
            for i, instruction in program
            if set(words) <= set(instruction.parts)
            and (reads is None or reads & instruction.reads)
            and (writes is None or writes & instruction.writes)
        }

    control, unknown = {"control"}, {UNKNOWN}
    marks: dict[str, Set[int]] = {
        "entry": {_ENTRY},
        "barriers": {i for i, instruction in program if instruction.is_block_barrier},
        "waits": where("griddepcontrol", "wait"),
        "releases": where("griddepcontrol", "launch_dependents"),
        "tickets": where("atom", "relaxed", writes=control),
        "arrivals": where("acq_rel", writes=control),
        "raises": where("release", writes=control),
        "y_loads": where(reads=OUTPUTS),
        "y_stores": where(writes=OUTPUTS),
        "unknown": where(reads=unknown) | where(writes=unknown),
        "stale": where("nc", reads={"h", "planes"}),
    }
    for name in ("x", "h", "planes"):
        marks[f"{name}_loads"] = where(reads={name})
        marks[f"{name}_stores"] = where(writes={name})
    # A wait runs again and again without a new ticket.
    marks["polls"] = {
        i
        for i in where("acquire", reads=control)
        if i in program.after([i], without=marks["tickets"])
    }
    return marks

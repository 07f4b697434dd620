"""What a pool notes of a version, of a slot, and of space that is being filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from oneplusn.adapters.blends import Parts
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.space import Need, Place, Space
from oneplusn.adapters.storage import Gates, Held
from oneplusn.errors import PoolExhausted
from oneplusn.kernels.plan import SlotInfo


class Shortage(Enum):
    """Why there is no room for an image.

    SCATTERED: Enough is free or idle, in too many pieces; `make_room` joins them.
    IN_USE: There will be enough when the requests in flight have ended.
    LASTING: What is pinned leaves too little, or the pool is too small.
    """

    SCATTERED = "scattered"
    IN_USE = "in use"
    LASTING = "lasting"


@dataclass(slots=True, eq=False)
class Slot:
    """A task, or a blend if it has `parts`, and how many requests use it."""

    info: SlotInfo
    gates: Gates = ()
    parts: Parts | None = None
    refs: int = 0


@dataclass(slots=True, eq=False)
class Version:
    """A version with a place in the pool, and the slots of its tasks."""

    digest: str
    held: Held
    slots: Mapping[str, int]
    num_bytes: int
    pins: int = 0
    last_used: int = 0

    def described(self, refs: int) -> ResidentVersion:
        """Return it for others to read."""
        return ResidentVersion(
            self.digest, tuple(self.slots), self.num_bytes, refs, self.pins, self.last_used
        )


@dataclass(slots=True, eq=False)
class Reservation:
    """Space taken for an image that nothing can acquire yet."""

    image: PageImage
    version: Version
    written: bool = False


@dataclass(frozen=True, slots=True)
class ResidentVersion:
    """A published version, as it is now; a larger `last_used` was used later."""

    digest: str
    tasks: tuple[str, ...]
    num_bytes: int
    refs: int
    pins: int
    last_used: int

    @property
    def is_idle(self) -> bool:
        """Whether it may be evicted."""
        return not (self.refs or self.pins)


def task_info(
    image: PageImage, task: str, run_ids: Sequence[int], run_pages: Sequence[int]
) -> SlotInfo:
    """Return what the slot of a task stands for, given the ids of the image's runs."""
    local = image.task_runs[task]
    return SlotInfo(
        key=image.task_keys[task],
        cluster=(image.digest,),
        runs=tuple(run_ids[run] for run in local),
        run_keys=tuple((image.digest, run) for run in local),
        run_pages=tuple(run_pages[run] for run in local),
    )


def exhausted(who: str, need: Need, place: Place, space: Space, num_idle: int) -> PoolExhausted:
    """Say what does not fit where."""
    return PoolExhausted(
        f"{who} takes {sum(need[place])} {place}; {space.ranges[place]}, even without "
        f"the {num_idle} idle adapters; unpin or unload some, or start with room for "
        f"more {'memory' if place.site else 'tasks'}"
    )

"""Resident adapter versions: how they come, who uses them, and which have to leave.

    reserve -> write, piece by piece -> publish -> acquire, release ... -> unload or eviction
            -> abort

A version's experts lie in runs; each of its tasks has a slot, which a row of the batch names. A
blend is a slot of its own over the runs of several tasks, for as long as a request uses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from oneplusn.adapters.blends import Parts, blend_gates, blend_key, blend_parts, is_one_task
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.space import Holding, Need, Place, Span
from oneplusn.adapters.storage import SLOTS, Gates, Held, Storage, gates_of, need_of, runs_of
from oneplusn.errors import AdapterError, AdapterExists, AdapterNotFound, PoolExhausted
from oneplusn.kernels.plan import BASE_SLOT, Site, SiteSpec, SlotInfo


@dataclass(slots=True, eq=False)
class _Slot:
    """A task, or a blend if it has `parts`, and how many requests use it."""

    info: SlotInfo
    gates: Gates
    parts: Parts | None = None
    refs: int = 0


@dataclass(slots=True, eq=False)
class _Version:
    """A version with a place in the pool, and the slots of its tasks."""

    digest: str
    held: Held
    slots: Mapping[str, int]
    num_bytes: int
    pins: int = 0
    last_used: int = 0


@dataclass(slots=True, eq=False)
class Reservation:
    """Space taken for an image that nothing can acquire yet."""

    image: PageImage
    version: _Version
    written: bool = False


@dataclass(frozen=True, slots=True)
class ResidentVersion:
    """A published version, for metrics; a larger `last_used` was used later."""

    digest: str
    num_bytes: int
    refs: int
    pins: int
    last_used: int


class Pool:
    """Owns the resident experts of one engine; lives on its thread, called between steps.

    Invariants, asserted by `check_integrity`: every page, gate, run id and slot is free or held
    once; tables say what is held and nothing else; whatever a referenced slot touches is resident;
    a blend lives exactly as long as it has references.

    Attributes:
        sites: Pages and table of every site, for `attach`.
        slots: What each slot stands for, for `build_plan`.
    """

    def __init__(
        self,
        specs: Sequence[SiteSpec],
        *,
        memory_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_tasks: int = 1024,
    ) -> None:
        """Allocate `memory_bytes` of pages and tables; tasks and blends together have slots.

        Raises:
            MemoryPlanRefused: When these are too few for a page at every site.
        """
        self._storage = Storage(
            specs, memory_bytes=memory_bytes, dtype=dtype, device=device, max_tasks=max_tasks
        )
        self.sites: Mapping[str, Site] = self._storage.sites
        self.slots: dict[int, SlotInfo] = {}
        self._versions: dict[str, _Version] = {}
        self._reserved: dict[str, Reservation] = {}
        self._slots: dict[int, _Slot] = {}
        self._blends: dict[Parts, Held] = {}
        self._clock = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return self._storage.num_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that are held, reserved ones included."""
        return sum(version.num_bytes for version in self._all_versions())

    def is_resident(self, digest: str) -> bool:
        """Tell whether the version's tasks can be acquired."""
        return digest in self._versions

    def resident(self) -> list[ResidentVersion]:
        """List the published versions, the least recently used first."""
        refs = self._references()
        return [
            ResidentVersion(v.digest, v.num_bytes, refs[v.digest], v.pins, v.last_used)
            for v in self._by_last_use()
        ]

    def load(self, image: PageImage) -> None:
        """Reserve, write and publish at once; a version that is resident stays as it is.

        Raises:
            PoolExhausted: As `reserve`.
        """
        if self.is_resident(image.digest):
            return
        reservation = self.reserve(image)
        for _ in self.write(reservation):
            pass
        self.publish(reservation)

    def reserve(self, image: PageImage) -> Reservation:
        """Take the space of `image`, evicting idle versions only as far as that needs.

        They leave in the order of their last use; one that is referenced or pinned never does.

        Raises:
            AdapterExists: When the version is resident or reserved.
            PoolExhausted: When it does not fit beside those that stay; then nothing has changed.
        """
        digest = image.digest
        if digest in self._versions or digest in self._reserved:
            msg = f"{digest} is in the pool already; unload it to write it again"
            raise AdapterExists(msg)
        runs = runs_of(image)
        gates = tuple(gates_of(image, task, runs) for task in image.tasks)
        held = Held(runs, gates, self._take(digest, need_of(runs, gates)))
        run_ids = held.run_ids
        slots = dict(zip(image.tasks, held.slots, strict=True))
        for (task, slot), of_task in zip(slots.items(), gates, strict=True):
            self._slots[slot] = _Slot(_task_info(image, task, run_ids), of_task)
        reservation = Reservation(image, _Version(digest, held, slots, image.num_bytes))
        self._reserved[digest] = reservation
        return reservation

    def write(self, reservation: Reservation) -> Iterator[int]:
        """Copy the image in, one run at one site a piece; yield the bytes of each.

        Steps may run in between: no plan names these runs and slots before `publish`.
        """
        held = reservation.version.held
        for name, image in reservation.image.sites.items():
            starts = list(accumulate(image.run_pages, initial=0))
            for run, pages in enumerate(image.run_pages):
                if pages:
                    part = slice(starts[run], starts[run + 1])
                    yield self._storage.write_run(held, name, run, image.a[part], image.b[part])
            self._storage.write_gates(held, name)
        reservation.written = True

    def publish(self, reservation: Reservation) -> None:
        """Let the version's tasks be acquired."""
        assert reservation.written, "publish comes after the last piece of write"
        version = self._reserved.pop(reservation.image.digest).version
        self._versions[version.digest] = version
        self.slots.update((slot, self._slots[slot].info) for slot in version.slots.values())
        self._touch([version.digest])

    def abort(self, reservation: Reservation) -> None:
        """Give the space of a reservation back, however much of it is written."""
        self._free(self._reserved.pop(reservation.image.digest).version.held)

    def acquire(self, refs: Sequence[TaskRef]) -> int:
        """Return the slot for rows of a request, and count a reference on all that it touches.

        No task means the base; one task of weight 1 has its slot; anything else is a blend, which
        shares the slot of an equal one or takes a new one.

        Raises:
            AdapterNotFound: When a version is not resident or has no such task.
            InvalidRequest: When a weight is zero or out of range, or the tasks are too many.
            PoolExhausted: When the slots or gates of a new blend do not fit.
        """
        parts = blend_parts(refs)
        if not parts:
            return BASE_SLOT
        id_ = self._find(parts)
        if id_ is None:
            id_ = self._make_blend(parts)
        slot = self._slots[id_]
        slot.refs += 1
        self._touch(slot.info.cluster)
        return id_

    def release(self, slot: int) -> None:
        """Take one reference of `acquire` back; a blend ends with its last."""
        if slot == BASE_SLOT:
            return
        used = self._slots[slot]
        assert used.refs > 0, f"slot {slot} was released more often than acquired"
        used.refs -= 1
        self._touch(used.info.cluster)
        if used.parts is not None and not used.refs:
            self._free(self._blends.pop(used.parts))

    def pin(self, digest: str) -> None:
        """Keep a version resident until as many calls of `unpin`.

        Raises:
            AdapterNotFound: When it is not resident.
        """
        self._version(digest).pins += 1

    def unpin(self, digest: str) -> None:
        """Take one `pin` back.

        Raises:
            AdapterNotFound: When it is not resident.
            AdapterError: When it is not pinned.
        """
        version = self._version(digest)
        if not version.pins:
            msg = f"{digest} is not pinned; there is nothing to take back"
            raise AdapterError(msg, code="adapter_not_pinned")
        version.pins -= 1

    def unload(self, digest: str) -> int:
        """Remove a version and return the bytes of the pages that are free now.

        Raises:
            AdapterNotFound: When it is not resident.
            AdapterError: When it is referenced or pinned.
        """
        version = self._version(digest)
        refs = self._references()[digest]
        if refs or version.pins:
            msg = (
                f"{digest} has {refs} references and {version.pins} pins; "
                f"end its requests and unpin it first"
            )
            raise AdapterError(msg, code="adapter_in_use")
        self._remove(version)
        return version.num_bytes

    def task_key(self, refs: Sequence[TaskRef]) -> str:
        """Return the content identity of what `refs` compute, for the KV prefix.

        Raises:
            AdapterNotFound: As `acquire`.
            InvalidRequest: As `acquire`.
        """
        parts = blend_parts(refs)
        keys = [self._task(digest, task).info.key for digest, task, _ in parts]
        return blend_key(keys, [weight for _, _, weight in parts])

    def compact(self) -> int:
        """Move pages and gates so that what is free is one range; return the bytes moved.

        For an idle engine, as it copies pages. Slots and run ids stay what they are.
        """
        return self._storage.compact(self._all_held())

    def check_integrity(self) -> None:
        """Assert the invariants of the class; reads every held page."""
        base: Holding = {SLOTS: [Span(BASE_SLOT, 1)]}
        self._storage.space.check([base, *(held.holding for held in self._all_held())])
        published = [version.held for version in self._versions.values()]
        public = [*published, *self._blends.values()]
        unwritten = [reservation.version.held for reservation in self._reserved.values()]
        self._storage.check(public, unwritten)

        tasks = {slot for v in self._all_versions() for slot in v.slots.values()}
        blends = {held.slots[0]: parts for parts, held in self._blends.items()}
        assert tasks | blends.keys() == self._slots.keys()
        assert self.slots == {
            slot: self._slots[slot].info for held in public for slot in held.slots
        }
        for id_, slot in self._slots.items():
            assert slot.parts == blends.get(id_)
            assert slot.refs >= (slot.parts is not None), f"slot {id_}: {slot.refs} references"
            assert not slot.refs or self._versions.keys() >= set(slot.info.cluster)

    def _all_versions(self) -> list[_Version]:
        reserved = (reservation.version for reservation in self._reserved.values())
        return [*self._versions.values(), *reserved]

    def _all_held(self) -> list[Held]:
        return [*(version.held for version in self._all_versions()), *self._blends.values()]

    def _by_last_use(self) -> list[_Version]:
        return sorted(self._versions.values(), key=lambda version: version.last_used)

    def _version(self, digest: str) -> _Version:
        if digest not in self._versions:
            msg = f"{digest} is not resident; load it first"
            raise AdapterNotFound(msg)
        return self._versions[digest]

    def _references(self) -> Counter[str]:
        """Count, per version, the references of its tasks and of the blends that touch it."""
        refs = Counter[str]()
        for slot in self._slots.values():
            refs.update(dict.fromkeys(slot.info.cluster, slot.refs))
        return refs

    def _touch(self, digests: Iterable[str]) -> None:
        self._clock += 1
        for digest in digests:
            self._versions[digest].last_used = self._clock

    def _take(self, who: str, need: Need, *, keep: Iterable[str] = ()) -> Holding:
        """Take space, all or nothing; evict idle versions other than `keep` until it fits."""
        refs = self._references()
        idle = [
            version
            for version in self._by_last_use()
            if not (refs[version.digest] or version.pins or version.digest in keep)
        ]
        free, num_victims = self._storage.space.copy(), 0
        while True:
            space = free.copy()
            taken = space.take(need)
            if not isinstance(taken, Place):
                break
            if num_victims == len(idle):
                msg = (
                    f"{who} takes {sum(need[taken])} {taken}; {free.ranges[taken]}, even without "
                    f"the {len(idle)} idle adapters; unpin or unload some, or start with room for "
                    f"more {'memory' if taken.site else 'tasks'}"
                )
                raise PoolExhausted(msg)
            free.give(idle[num_victims].held.holding)
            num_victims += 1
        for victim in idle[:num_victims]:
            self._remove(victim)
        self._storage.space = space
        return taken

    def _remove(self, version: _Version) -> None:
        del self._versions[version.digest]
        self._free(version.held)

    def _free(self, held: Held) -> None:
        for slot in held.slots:
            del self._slots[slot]
            self.slots.pop(slot, None)
        self._storage.free(held)

    def _task(self, digest: str, task: str) -> _Slot:
        slots = self._version(digest).slots
        if task not in slots:
            msg = f"{digest} has no task {task!r}; it has {', '.join(slots)}"
            raise AdapterNotFound(msg)
        return self._slots[slots[task]]

    def _find(self, parts: Parts) -> int | None:
        """Return the slot that computes `parts`, if one does."""
        for digest, task, _ in parts:
            self._task(digest, task)
        if is_one_task(parts):
            digest, task, _ = parts[0]
            return self._versions[digest].slots[task]
        blend = self._blends.get(parts)
        return blend.slots[0] if blend else None

    def _make_blend(self, parts: Parts) -> int:
        tasks = [self._task(digest, task) for digest, task, _ in parts]
        weights = [weight for _, _, weight in parts]
        runs, gates = blend_gates([(task.info, task.gates) for task in tasks], weights)
        cluster = tuple(sorted({digest for digest, _, _ in parts}))
        held = Held((), (gates,), self._take("a blend", need_of((), (gates,)), keep=cluster))
        for name in held.sites:
            self._storage.write_gates(held, name)
        key = blend_key([task.info.key for task in tasks], weights)
        pages = {
            run: count
            for task in tasks
            for run, count in zip(task.info.runs, task.info.run_pages, strict=True)
        }
        info = SlotInfo(
            key, cluster, tuple(runs), tuple(runs.values()), tuple(pages[run] for run in runs)
        )
        (id_,) = held.slots
        self._slots[id_], self.slots[id_] = _Slot(info, gates, parts), info
        self._blends[parts] = held
        return id_


def _task_info(image: PageImage, task: str, run_ids: Sequence[int]) -> SlotInfo:
    local = image.task_runs[task]
    return SlotInfo(
        key=image.task_keys[task],
        cluster=(image.digest,),
        runs=tuple(run_ids[run] for run in local),
        run_keys=tuple((image.digest, run) for run in local),
        run_pages=tuple(max(site.run_pages[run] for site in image.sites.values()) for run in local),
    )

"""Resident adapter versions: how they come, who uses them, and which have to leave.

    reserve -> write, piece by piece -> publish -> acquire, release ... -> unload or eviction
            -> abort

A version's experts lie in runs; each of its tasks has a slot, which a row of the batch names. A
blend is a slot of its own over the runs of several tasks, for as long as a request uses it. Tables
and slots know nothing of a version before it is published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from oneplusn.adapters.blends import (
    Parts,
    blend_gates,
    blend_info,
    blend_key,
    blend_parts,
    is_one_task,
)
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.residents import (
    Reservation,
    ResidentVersion,
    Shortage,
    Slot,
    Version,
    exhausted,
    task_info,
)
from oneplusn.adapters.space import Holding, Need, Place, Span
from oneplusn.adapters.storage import SLOTS, Held, Layout, Storage, gates_of
from oneplusn.errors import AdapterError, AdapterExists, AdapterNotFound, PoolExhausted
from oneplusn.kernels.plan import BASE_SLOT, Site, SiteSpec, SlotInfo


class Pool:
    """Owns the resident experts of one engine; lives on its thread, called between steps.

    Invariants, asserted by `check_integrity`: every page, gate, run id and slot is free or held
    once; tables say what is held and nothing else; whatever a referenced slot touches is resident;
    a blend lives exactly as long as it has references.

    Attributes:
        sites: Pages and table of every site, for `attach`.
        slots: What each slot stands for, for `build_plan`.
        on_evict: Told the digest and the bytes of every version that had to make room.
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

        A model without sites has no pages, and room for no adapter.

        Raises:
            MemoryPlanRefused: When these are too few for a page at every site.
        """
        self._storage = Storage(
            specs, memory_bytes=memory_bytes, dtype=dtype, device=device, max_tasks=max_tasks
        )
        self.sites: Mapping[str, Site] = self._storage.sites
        self.slots: dict[int, SlotInfo] = {}
        self._versions: dict[str, Version] = {}
        self._reserved: dict[str, Reservation] = {}
        self._slots: dict[int, Slot] = {}
        self._blends: dict[Parts, Held] = {}
        self._clock = 0
        self.on_evict: Callable[[str, int], None] | None = None

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
        return [version.described(refs[version.digest]) for version in self._by_last_use()]

    def describe(self, digest: str) -> ResidentVersion:
        """Return what is known of a published version.

        Raises:
            AdapterNotFound: When it is not resident.
        """
        return self._version(digest).described(self._references()[digest])

    def touch(self, *digests: str) -> None:
        """Count resident versions as used now, all at once."""
        self._clock += 1
        for digest in digests:
            self._versions[digest].last_used = self._clock

    def load(self, image: PageImage) -> None:
        """Make room, reserve, write and publish at once; a resident version stays as it is.

        Raises:
            AdapterIncompatible: As `reserve`.
            PoolExhausted: As `reserve`, though not for want of one piece.
        """
        if self.is_resident(image.digest):
            return
        try:
            reservation = self.reserve(image)
        except PoolExhausted:
            if self.shortage(image) is not Shortage.SCATTERED:
                raise
            for _ in self.make_room(image):
                pass
            reservation = self.reserve(image)
        for _ in self.write(reservation):
            pass
        self.publish(reservation)

    def reserve(self, image: PageImage) -> Reservation:
        """Take the space of `image`, evicting idle versions only as far as that needs.

        They leave in the order of their last use; one that is referenced or pinned never does.

        Raises:
            AdapterExists: When the version is resident or reserved.
            AdapterIncompatible: When it was laid out for another base model.
            PoolExhausted: When it does not fit beside those that stay; then nothing has changed,
                and `shortage` says what would help.
        """
        digest = image.digest
        if digest in self._versions or digest in self._reserved:
            raise AdapterExists(f"{digest} is in the pool already; unload it to write it again")
        layout = self._storage.layout(image)
        held = Held(layout, self._take(digest, self._storage.need(layout)))
        slots = dict(zip(image.tasks, held.slots, strict=True))
        run_pages = layout.run_pages.max(axis=1, initial=0).tolist()
        for task, slot in slots.items():
            self._slots[slot] = Slot(task_info(image, task, held.run_ids, run_pages))
        reservation = Reservation(image, Version(digest, held, slots, image.num_bytes))
        self._reserved[digest] = reservation
        return reservation

    def shortage(self, image: PageImage) -> Shortage:
        """Say why `reserve` found no room for `image`.

        Raises:
            AdapterIncompatible: As `reserve`.
        """
        need = self._storage.need(self._storage.layout(image))
        space, idle = self._storage.space.copy(), self._idle()
        for version in idle:
            space.give(version.held.holding)
        if space.amounts_to(need):
            return Shortage.SCATTERED
        in_use = [v.held for v in self._versions.values() if not v.pins and v not in idle]
        for held in (*in_use, *self._blends.values()):
            space.give(held.holding)
        return Shortage.IN_USE if space.amounts_to(need) else Shortage.LASTING

    def make_room(self, image: PageImage) -> Iterator[int]:
        """Evict idle versions until enough is free for `image`, and join it, site by site.

        Steps may run in between; what they change may make another round necessary.

        Yields:
            The bytes moved by every piece of the work.

        Raises:
            AdapterIncompatible: As `reserve`.
        """
        need = self._storage.need(self._storage.layout(image))
        for version in self._idle():
            if self._storage.space.amounts_to(need):
                break
            self._storage.space.give(version.held.holding)
            self._evict(version)
        yield from self.compact()

    def write(self, reservation: Reservation) -> Iterator[int]:
        """Copy the image in, a bounded piece at a time; yield the bytes of each.

        Steps may run in between: no table, plan or slot names what is written before `publish`.

        Raises:
            AdapterIncompatible: When the image contradicts itself.
        """
        image, held = reservation.image, reservation.version.held
        yield from self._storage.write_pages(held, image)
        for task, slot in reservation.version.slots.items():
            self._slots[slot].gates = gates = gates_of(image, task, held.layout)
            yield self._storage.write_gates(held, gates)
        reservation.written = True

    def publish(self, reservation: Reservation) -> None:
        """Let the version's tasks be acquired."""
        assert reservation.written, "publish comes after the last piece of write"
        version = self._reserved.pop(reservation.image.digest).version
        self._storage.enlist(version.held)
        self._versions[version.digest] = version
        self.slots.update((slot, self._slots[slot].info) for slot in version.slots.values())
        self.touch(version.digest)

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
        self.touch(*slot.info.cluster)
        return id_

    def release(self, slot: int) -> None:
        """Take one reference of `acquire` back; a blend ends with its last."""
        if slot == BASE_SLOT:
            return
        used = self._slots[slot]
        assert used.refs > 0, f"slot {slot} was released more often than acquired"
        used.refs -= 1
        self.touch(*used.info.cluster)
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
        del self._versions[digest]
        self._free(version.held)
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

    def compact(self) -> Iterator[int]:
        """Move pages and gates so that what is free is one range; slots and run ids stay.

        Steps may run in between.

        Yields:
            The bytes moved at every site, one site after the other.
        """
        for name in self.sites:
            yield self._storage.compact(name, self._all_held())
        self._storage.compact_gates(self._all_held())

    def check_integrity(self) -> None:
        """Assert the invariants of the class; reads every held page."""
        base: Holding = {SLOTS: [Span(BASE_SLOT, 1)]}
        everything = self._all_held()
        self._storage.space.check([base, *(held.holding for held in everything)])
        self._storage.check(everything)

        published = [version.held for version in self._versions.values()]
        public = [*published, *self._blends.values()]
        assert {id(held) for held in everything if held.listed} == set(map(id, public))
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

    def _all_versions(self) -> list[Version]:
        reserved = (reservation.version for reservation in self._reserved.values())
        return [*self._versions.values(), *reserved]

    def _all_held(self) -> list[Held]:
        return [*(version.held for version in self._all_versions()), *self._blends.values()]

    def _by_last_use(self) -> list[Version]:
        return sorted(self._versions.values(), key=lambda version: version.last_used)

    def _idle(self, keep: Iterable[str] = ()) -> list[Version]:
        """List what may be evicted, the least recently used first."""
        refs = self._references()
        return [
            version
            for version in self._by_last_use()
            if not (refs[version.digest] or version.pins or version.digest in keep)
        ]

    def _version(self, digest: str) -> Version:
        if digest not in self._versions:
            msg = f"{digest} is not resident; load it first"
            raise AdapterNotFound(msg, code="adapter_not_resident")
        return self._versions[digest]

    def _references(self) -> Counter[str]:
        """Count, per version, the references of its tasks and of the blends that touch it."""
        refs = Counter[str]()
        for slot in self._slots.values():
            if slot.refs:
                refs.update(dict.fromkeys(slot.info.cluster, slot.refs))
        return refs

    def _take(self, who: str, need: Need, *, keep: Iterable[str] = ()) -> Holding:
        """Take space, all or nothing; evict idle versions other than `keep` until it fits.

        Raises:
            PoolExhausted: It does not fit beside the others.
        """
        taken = self._storage.space.take(need)
        if not isinstance(taken, Place):
            return taken
        idle, space, victims = self._idle(keep), self._storage.space.copy(), list[Version]()
        while isinstance(taken, Place):
            if len(victims) == len(idle):
                raise exhausted(who, need, taken, space, len(idle))
            victims.append(idle[len(victims)])
            space.give(victims[-1].held.holding)
            if space.fits(need, taken):
                taken = space.take(need)
        self._storage.space = space
        for victim in victims:
            self._evict(victim)
        return taken

    def _evict(self, version: Version) -> None:
        """Forget a version whose space has been given back."""
        del self._versions[version.digest]
        self._forget(version.held)
        if self.on_evict is not None:
            self.on_evict(version.digest, version.num_bytes)

    def _free(self, held: Held) -> None:
        self._storage.space.give(held.holding)
        self._forget(held)

    def _forget(self, held: Held) -> None:
        """Remove what names the slots and runs."""
        for slot in held.slots:
            del self._slots[slot]
            self.slots.pop(slot, None)
        self._storage.delist(held)

    def _task(self, digest: str, task: str) -> Slot:
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
        rows = np.array([part.rows for part in gates], np.int32)
        layout = Layout(rows[:0], (rows,))
        held = Held(layout, self._take("a blend", self._storage.need(layout), keep=cluster))
        self._storage.write_gates(held, gates)
        self._storage.enlist(held)
        (id_,) = held.slots
        info = blend_info([task.info for task in tasks], runs, weights)
        self._slots[id_], self.slots[id_] = Slot(info, gates, parts), info
        self._blends[parts] = held
        return id_

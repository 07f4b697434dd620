"""Which adapter versions are here, on their way or leaving, and which sequences wait for them.

The API says what is wanted: `Load` brings a version in, `Unload` lets it go. In between the pool
alone decides what stays: a version that is loaded with `pin` always does, any other may be evicted
while no request refers to it, least recently used first. An eviction is told as `Freed`, like the
end of an `Unload`; the API sends `Load` again ahead of the next `Submit` that needs the version.

A `Load` of what is here or on its way already is cheap: it counts as a use, pins or unpins the
version if it says so, takes back an `Unload` that still waits for requests, and is answered at
once or with the load that is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from oneplusn.adapters.blends import blend_parts
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.pool import Pool
from oneplusn.errors import AdapterNotFound, OneplusnError
from oneplusn.server.engine.loading import Arrival, Loader
from oneplusn.server.engine.sequence import Sequence
from oneplusn.server.messages import Freed, Loaded


@dataclass(slots=True)
class Settled:
    """Sequences that have waited long enough: these have a slot, those an error."""

    ready: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, OneplusnError]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A sequence, and which of its versions are still on their way; it pins the others."""

    seq: Sequence
    missing: set[str]


class Residency:
    """Brings versions into a pool and out of it, and gives sequences their slots.

    Every load and every unload is answered by one event of `poll`; one `Loaded` answers all loads
    of its version that came before it.

    Invariants (`check_integrity`):
        * A version that is leaving is here or on its way, and referred to or waited for.
        * A sequence that waits does so for versions that are on their way, one at least.
    """

    def __init__(self, pool: Pool, clock: Callable[[], float]) -> None:
        """Take a pool over; nobody else loads, unloads or pins."""
        self.pool = pool
        self.pool.on_evict = self._freed
        self._loader = Loader(pool, clock)
        self._events: list[Loaded | Freed] = []
        self._pinned: set[str] = set()
        self._leaving: set[str] = set()
        self._waiting: dict[str, _Waiting] = {}

    @property
    def is_writing(self) -> bool:
        """Whether `write_some` has something to write."""
        return self._loader.is_writing

    def poll(self) -> list[Loaded | Freed]:
        """Return what came or left since the last call."""
        events, self._events = self._events, []
        return events

    def keep(self, digest: str, *, pin: bool | None) -> bool:
        """Answer a load of what is here or on its way; tell whether it is.

        Args:
            digest: The version.
            pin: Whether it is pinned from now on; None = as before.
        """
        here = self.pool.is_resident(digest)
        if not here and digest not in self._loader:
            return False
        if digest in self._leaving:
            self._leaving.remove(digest)
            self._freed(digest, 0)
        if pin is not None:
            self._pin(digest, pin)
        if here:
            self.pool.touch(digest)
            self._events.append(Loaded(digest, self.pool.describe(digest).num_bytes))
        return True

    def begin_load(self, image: PageImage, *, pin: bool | None) -> None:
        """Queue a version to be written, unless it is here or on its way."""
        if not self.keep(image.digest, pin=pin):
            self._loader.add(image)
            self._pin(image.digest, bool(pin))

    def load(self, image: PageImage, *, pin: bool) -> None:
        """Bring a version in at once, without an event.

        Raises:
            AdapterIncompatible: It was laid out for another base model.
            PoolExhausted: It does not fit beside what is in use.
        """
        assert image.digest not in self._loader, f"{image.digest} is on its way already"
        self.pool.load(image)
        self._pin(image.digest, pin)

    def write_some(self, seconds: float) -> Settled:
        """Write what is on its way for about so long; say which sequences it was for."""
        settled = Settled()
        for arrival in self._loader.work(seconds):
            self._arrived(arrival, settled)
        return settled

    def unload(self, digest: str) -> None:
        """Let a version go as soon as nothing refers to it; from now on nothing can any more.

        One that is on its way is stopped, unless a sequence waits for it. One that is not here is
        freed already: it may just have been evicted.
        """
        self._pin(digest, pin=False)
        if self.pool.is_resident(digest) or digest in self._loader:
            self._leaving.add(digest)
            self._leave([digest])
        else:
            self._freed(digest, 0)

    def acquire(self, seq: Sequence) -> bool:
        """Give a new sequence its slot, or note that it waits; tell whether it has one.

        Raises:
            AdapterNotFound: A version is neither here nor on its way, or has no such task.
            InvalidRequest: The blend is malformed.
            PoolExhausted: There is no room for one more blend.
        """
        for digest in seq.adapters & self._leaving:
            msg = f"{digest} is being unloaded; ask for the version that took its place"
            raise AdapterNotFound(msg, code="adapter_not_resident")
        missing = {digest for digest in seq.adapters if digest in self._loader}
        if missing:
            self._check(seq)
            for digest in seq.adapters - missing:
                self.pool.pin(digest)
            self._waiting[seq.id] = _Waiting(seq, missing)
        else:
            seq.slot, seq.task_key = self.pool.acquire(seq.refs), self.pool.task_key(seq.refs)
        return not missing

    def release(self, seq: Sequence) -> None:
        """Let go of what a sequence holds or waits for."""
        if seq.id in self._waiting:
            self._stop_waiting(seq)
        elif seq.slot is not None:
            self.pool.release(seq.slot)
        if seq.adapters:
            self._leave(seq.adapters & self._leaving)
            self._loader.retry()

    def check_integrity(self) -> None:
        """Assert the invariants of this class and of the pool."""
        self.pool.check_integrity()
        resident = {version.digest for version in self.pool.resident()}
        assert not any(digest in self._loader for digest in resident)
        for digest in self._leaving:
            assert digest not in self._pinned
            waited_for = digest in self._loader and self._waiters(digest)
            assert waited_for or not self.pool.describe(digest).is_idle
        for waiting in self._waiting.values():
            assert waiting.missing, f"{waiting.seq.id} waits for nothing"
            assert all(digest in self._loader for digest in waiting.missing)
            assert waiting.seq.adapters - waiting.missing <= resident

    def _check(self, seq: Sequence) -> None:
        """Refuse now what would be refused when the versions have come.

        Raises:
            AdapterNotFound: A version is neither here nor on its way, or has no such task.
            InvalidRequest: The blend is malformed.
        """
        blend_parts(seq.refs)
        for ref in seq.refs:
            if ref.digest in self._loader:
                tasks = self._loader.image(ref.digest).tasks
            else:
                tasks = self.pool.describe(ref.digest).tasks
            if ref.task not in tasks:
                msg = f"{ref.digest} has no task {ref.task!r}; it has {', '.join(tasks)}"
                raise AdapterNotFound(msg)

    def _waiters(self, digest: str) -> list[_Waiting]:
        return [waiting for waiting in self._waiting.values() if digest in waiting.missing]

    def _pin(self, digest: str, pin: bool) -> None:
        """Note whether the API pins a version, and tell the pool if it is there."""
        if pin == (digest in self._pinned):
            return
        if pin:
            self._pinned.add(digest)
        else:
            self._pinned.remove(digest)
            self._loader.retry()
        if self.pool.is_resident(digest):
            (self.pool.pin if pin else self.pool.unpin)(digest)

    def _arrived(self, arrival: Arrival, settled: Settled) -> None:
        """Tell the end of a load, and serve those who waited for it."""
        digest, error = arrival.image.digest, arrival.error
        if error is None:
            self._events.append(Loaded(digest, arrival.image.num_bytes))
            if digest in self._pinned:
                self.pool.pin(digest)
            for waiting in self._waiters(digest):
                waiting.missing.remove(digest)
                self.pool.pin(digest)
                if not waiting.missing:
                    self._serve(waiting.seq, settled)
        else:
            self._lost(digest, error.message, error.code)
            for waiting in self._waiters(digest):
                settled.failed.append((waiting.seq, error))
                self.release(waiting.seq)
        self._leave({digest} & self._leaving)

    def _serve(self, seq: Sequence, settled: Settled) -> None:
        """Give a sequence its slot, now that all its versions are here."""
        try:
            seq.slot, seq.task_key = self.pool.acquire(seq.refs), self.pool.task_key(seq.refs)
        except OneplusnError as error:
            settled.failed.append((seq, error))
            self.release(seq)
        else:
            settled.ready.append(seq)
            self._stop_waiting(seq)

    def _stop_waiting(self, seq: Sequence) -> None:
        for digest in seq.adapters - self._waiting.pop(seq.id).missing:
            self.pool.unpin(digest)

    def _leave(self, digests: Iterable[str]) -> None:
        """Let those of some leaving versions go that nothing refers to any more."""
        for digest in digests:
            if digest in self._loader:
                if not self._waiters(digest):
                    self._loader.remove(digest)
                    self._lost(digest, f"{digest} was unloaded before it came", "adapter_unloaded")
            elif self.pool.describe(digest).is_idle:
                self._leaving.remove(digest)
                self._freed(digest, self.pool.unload(digest))

    def _lost(self, digest: str, error: str, code: str) -> None:
        """Tell that a version will not come; that answers an unload as well."""
        self._pinned.discard(digest)
        self._events.append(Loaded(digest, error=error, code=code))
        if digest in self._leaving:
            self._leaving.remove(digest)
            self._freed(digest, 0)

    def _freed(self, digest: str, num_bytes: int) -> None:
        self._events.append(Freed(digest, num_bytes))
        self._loader.retry()

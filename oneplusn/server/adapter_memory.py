"""The engine's memory of adapters, as the API knows it: what is there, and who waits for what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Set

from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import AdapterNotFound, OneplusnError, adapter_error
from oneplusn.server.messages import Freed, Load, Loaded, Unload
from oneplusn.server.metrics import Metrics


class AdapterMemory:
    """Asks for versions to come and to leave, and keeps count. Lives on the event loop."""

    def __init__(self, send: Callable[[Load | Unload], None], metrics: Metrics) -> None:
        self._send = send
        self._metrics = metrics
        self._bytes: dict[str, int] = {}
        self._loads: dict[str, asyncio.Future[int]] = {}
        self._began: dict[str, float] = {}
        self._unloads: dict[str, asyncio.Future[int]] = {}

    @property
    def resident(self) -> Set[str]:
        """Versions that are there."""
        return self._bytes.keys()

    @property
    def loading(self) -> Set[str]:
        """Versions on their way."""
        return self._loads.keys()

    def missing(self, refs: Iterable[TaskRef]) -> Set[str]:
        """Return the versions in `refs` that are neither there nor on their way."""
        # One by one: a difference of sets would walk through all that are there.
        asked = {ref.digest for ref in refs}
        return {d for d in asked if d not in self.resident and d not in self.loading}

    def load(self, digest: str, path: str, *, pin: bool | None) -> asyncio.Future[int]:
        """Ask for a version; everyone who asks shares the future, which holds its bytes."""
        self._send(Load(digest, path, pin))
        self._began.setdefault(digest, time.perf_counter())
        return _shared(self._loads, digest)

    def unload(self, digest: str, *, force: bool) -> asyncio.Future[int]:
        """Ask for a version to leave; everyone who asks shares the future.

        It holds the bytes freed: 0 if someone asked for the version again before it left.

        Raises:
            AdapterNotFound: It is neither there nor on its way.
        """
        if digest not in self.resident and digest not in self.loading:
            raise AdapterNotFound(f"{digest} is not resident; there is nothing to unload")
        self._send(Unload(digest, force))
        return _shared(self._unloads, digest)

    def receive(self, message: Loaded | Freed) -> None:
        """Take note of a version that came, could not come, or left."""
        if isinstance(message, Freed):
            self._bytes.pop(message.digest, None)
            waiting = self._unloads.pop(message.digest, None)
            if waiting is None:
                self._metrics.count("adapter_cache_evictions")
            else:
                waiting.set_result(message.num_bytes)
        else:
            self._receive_loaded(message)
        self._count()

    def lost(self, error: OneplusnError) -> None:
        """Forget everything, as the engine is gone."""
        waiting = [*self._loads.values(), *self._unloads.values()]
        for known in (self._bytes, self._loads, self._unloads, self._began):
            known.clear()
        for future in waiting:
            future.set_exception(error)
        self._count()

    def _receive_loaded(self, message: Loaded) -> None:
        waiting = self._loads.pop(message.digest, None)
        began = self._began.pop(message.digest, None)
        if message.error is None:
            if began is not None:
                self._metrics.observe("adapter_load_seconds", time.perf_counter() - began)
            self._bytes[message.digest] = message.num_bytes
            if waiting is not None:
                waiting.set_result(message.num_bytes)
        elif waiting is not None:
            waiting.set_exception(adapter_error(message.error, message.code))

    def _count(self) -> None:
        self._metrics.set("adapters_resident", len(self._bytes))
        self._metrics.set("adapter_resident_bytes", sum(self._bytes.values()))


def _shared(waiting: dict[str, asyncio.Future[int]], digest: str) -> asyncio.Future[int]:
    """Return the future of a version, made for the first who asks."""
    future = waiting.get(digest)
    if future is None:
        future = waiting[digest] = asyncio.get_running_loop().create_future()
        # Looked at here, since whoever asked may have gone by the time it fails.
        future.add_done_callback(asyncio.Future.exception)
    return future

"""Adapters in and out: the registry says what exists, the engine holds what is asked for.

    publish:  upload -> worker (checks, blob, page image) -> engine (pages) -> registry (one
              transaction: kept and active) -> the engine drops the old version when it is idle

The order makes it all or nothing: what the engine refuses is never written, and nobody asks for a
version before its pages are there. Whatever is in flight ends on the version it began with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from oneplusn.adapters.prepared import IMAGE_FILE, BaseLayout, Prepared
from oneplusn.adapters.registry import Adapter, Registry, Version
from oneplusn.errors import AdapterConflict, AdapterCorrupt, AdapterNotFound, OneplusnError
from oneplusn.server.bridge import AsyncEngine
from oneplusn.server.metrics import Metrics
from oneplusn.server.targets import check_defaults
from oneplusn.server.workers import Workers

Source = Path | Mapping[str, Path]
_log = logging.getLogger("oneplusn.server")


class Swaps:
    """Changes what the names of adapters mean, and what is resident. Lives on the event loop."""

    def __init__(
        self,
        registry: Registry,
        engine: AsyncEngine,
        workers: Workers,
        metrics: Metrics,
        *,
        layout: BaseLayout,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._workers = workers
        self._metrics = metrics
        self._layout = layout
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._leaving: set[asyncio.Task[None]] = set()

    async def inspect(
        self, source: Source, name: str, *, strict: bool = True, assume_converted: bool = False
    ) -> Prepared:
        """Say what would come of an upload, and keep nothing of it.

        Raises:
            AdapterError: It cannot be served, with a code that says why.
            InvalidRequest: A task brings sampling that is out of range.
            WorkerFailed: It takes too much time or memory.
        """
        with self._registry.incoming() as out:
            prepared = await self._workers.prepare(
                source,
                out,
                name=name,
                base=self._layout,
                dry_run=True,
                strict=strict,
                assume_converted=assume_converted,
            )
        check_defaults(prepared.task_defaults)
        return prepared

    async def publish(
        self,
        source: Source,
        name: str,
        *,
        activate: bool = True,
        if_match: int | None = None,
        strict: bool = True,
        assume_converted: bool = False,
    ) -> tuple[Version, bool, Prepared]:
        """Keep an upload as a version of an adapter, and let the adapter's tasks mean it.

        Args:
            source: A folder or an archive, or files by the names that the client gave.
            name: Of the adapter.
            activate: Otherwise it is kept, and not loaded.
            if_match: Generation that the adapter must have.
            strict: Refuse modules that the base does not have, and another base's fingerprint.
            assume_converted: Take an adapter whose training changed the base as converted.

        Returns:
            The version, whether it is new to the adapter, and how it fits the base.

        Raises:
            AdapterError: A name is taken, or the model or the memory cannot take it.
            InvalidRequest: A task brings sampling that is out of range.
            WorkerFailed: It takes too much time or memory.
            StorageFull: There is no room for it on the disk.
        """
        self._registry.check(name, ())
        with self._registry.incoming() as out:
            prepared = await self._workers.prepare(
                source,
                out,
                name=name,
                base=self._layout,
                strict=strict,
                assume_converted=assume_converted,
            )
            check_defaults(prepared.task_defaults)
            keep = partial(
                self._registry.publish, prepared, out, activate=activate, if_match=if_match
            )
            if not activate:
                version, new = await asyncio.to_thread(keep)
                return version, new, prepared
            async with self._turn(name):
                self._registry.check(name, prepared.tasks)
                async with self._swap(name, prepared.digest, str(out / IMAGE_FILE)):
                    version, new = await asyncio.to_thread(keep)
        return version, new, prepared

    async def activate(self, name: str, number: int, *, if_match: int | None = None) -> Version:
        """Let the adapter's tasks mean a version that is kept already.

        Raises:
            AdapterError: It is not there, damaged, or one of its tasks belongs to another adapter.
        """
        async with self._turn(name):
            digest = self._registry.version(name, number).digest
            flip = partial(self._registry.activate, name, number, if_match=if_match)
            async with self._swap(name, digest, await self.locate(digest)):
                return await asyncio.to_thread(flip)

    async def rollback(self, name: str, *, if_match: int | None = None) -> Version:
        """Let the adapter's tasks mean what they meant before.

        Raises:
            AdapterError: There is nothing to go back to, or it is damaged.
        """
        async with self._turn(name):
            digest = self._registry.previous(name).digest
            flip = partial(self._registry.rollback, name, if_match=if_match)
            async with self._swap(name, digest, await self.locate(digest)):
                return await asyncio.to_thread(flip)

    async def deactivate(self, name: str) -> Adapter:
        """Let the adapter's tasks mean nothing; what is in flight goes on.

        Raises:
            AdapterError: It is not there, or pinned.
        """
        async with self._turn(name):
            before = self._digests(name)
            adapter = await asyncio.to_thread(self._registry.deactivate, name)
            self._retire(before)
            return adapter

    async def delete(
        self, name: str, number: int | None = None, *, if_match: int | None = None
    ) -> list[Version]:
        """Forget a version that is not active, or an adapter; what is in flight goes on.

        Raises:
            AdapterError: It is not there, pinned or active.
        """
        async with self._turn(name):
            delete = partial(self._registry.delete, name, number, if_match=if_match)
            gone = await asyncio.to_thread(delete)
            self._retire(version.digest for version in gone)
            return gone

    async def pin(self, name: str, pinned: bool) -> Adapter:
        """Keep an adapter in memory whoever needs room, or no longer.

        Raises:
            AdapterError: It is not there, or does not fit.
        """
        async with self._turn(name):
            adapter = await asyncio.to_thread(self._registry.pin, name, pinned)
            active = adapter.active
            if active is not None and (pinned or active.digest in self._engine.resident):
                await self._bring(name, active.digest, await self.locate(active.digest))
            return adapter

    async def load(self, name: str) -> int:
        """Bring the active version of an adapter into memory; return its bytes.

        Raises:
            AdapterError: There is none, or it does not fit.
        """
        async with self._turn(name):
            digest = self._active(name).digest
            return await self._bring(name, digest, await self.locate(digest))

    async def unload(
        self, name: str, *, force: bool = False, patience: float | None = None
    ) -> int | None:
        """Take the active version of an adapter out of memory; it comes back when it is asked for.

        Args:
            name: Of the adapter.
            force: End the requests that use it.
            patience: Seconds to wait for those that use it; None = for ever.

        Returns:
            The bytes freed, 0 if it was asked for again; None if it will leave later.

        Raises:
            AdapterError: It is not there, pinned, or not resident.
        """
        digest = self._active(name).digest
        if self._registry.adapter(name).pinned:
            msg = f"{name!r} is pinned; unpin it first"
            raise AdapterConflict(msg, code="adapter_pinned")
        try:
            return await asyncio.wait_for(self._engine.unload(digest, force=force), patience)
        except TimeoutError:
            return None

    async def load_active(self) -> None:
        """Bring the active versions in, the pinned ones first, until one has to leave for another.

        Raises:
            AdapterError: One cannot be served.
        """
        active = {a.active.digest: a for a in self._registry.adapters() if a.active is not None}
        for digest, adapter in sorted(active.items(), key=lambda item: not item[1].pinned):
            before = len(self._engine.resident)
            try:
                await self._bring(adapter.name, digest, await self.locate(digest))
            except AdapterCorrupt as error:
                _log.error("the adapter %s is out of service: %s", adapter.name, error.message)
                continue
            if len(self._engine.resident) <= before:
                _log.info("adapter memory is full; the others are loaded when they are asked for")
                return

    async def locate(self, digest: str) -> str:
        """Return the page image of a version that is kept, made again if it is gone.

        Raises:
            AdapterCorrupt: Its files are damaged; they are put aside.
            WorkerFailed: It takes too much time or memory.
        """
        blob = self._registry.blob(digest)
        image = self._registry.image(digest, self._layout.key)
        try:
            await self._workers.ensure_image(digest, blob, image, self._layout)
        except AdapterCorrupt as error:
            await asyncio.to_thread(self._registry.quarantine, digest, error.message)
            raise
        return str(image)

    @asynccontextmanager
    async def _swap(self, name: str, digest: str, image: str) -> AsyncIterator[None]:
        """Bring a version in, have the block make it the active one, and let the others go."""
        touched = {*self._digests(name), digest}
        began = time.perf_counter()
        try:
            await self._bring(name, digest, image)
            yield
        finally:
            self._retire(touched)
        self._metrics.observe("adapter_swap_seconds", time.perf_counter() - began)
        for task in self._active(name).tasks:
            self._metrics.task_label(task)

    async def _bring(self, name: str, digest: str, image: str) -> int:
        """Make a version of an adapter resident, pinned if the adapter is."""
        pinned = False
        with suppress(AdapterNotFound):  # it is about to be published for the first time
            pinned = self._registry.adapter(name).pinned
        return await self._engine.load(digest, image, pin=pinned)

    def _retire(self, digests: Iterable[str]) -> None:
        """Let versions go that nobody can ask for any more, once nobody uses them."""
        wanted = {version.digest for version in self._registry.active()}
        for digest in self._engine.resident & (set(digests) - wanted):
            task = asyncio.create_task(self._leave(digest))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _leave(self, digest: str) -> None:
        # It may have left by itself, be wanted again, or have gone down with the engine.
        with suppress(OneplusnError):
            await self._engine.unload(digest)

    def _turn(self, name: str) -> asyncio.Lock:
        """Return the lock of an adapter: its versions change one after the other."""
        return self._turns.setdefault(name, asyncio.Lock())

    def _digests(self, name: str) -> set[str]:
        """Return the contents of all versions of an adapter; none if it is not there."""
        with suppress(AdapterNotFound):
            return {version.digest for version in self._registry.versions(name)}
        return set()

    def _active(self, name: str) -> Version:
        """Return the active version of an adapter.

        Raises:
            AdapterNotFound: There is none.
        """
        active = self._registry.adapter(name).active
        if active is None:
            msg = f"no version of {name!r} is active; activate one"
            raise AdapterNotFound(msg)
        return active

"""The parts of one running server, put together, started and stopped in order."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from oneplusn.adapters.registry import Registry, Version
from oneplusn.errors import (
    AdapterError,
    AdapterNotFound,
    ConfigError,
    EngineStopped,
    MemoryPlanRefused,
    PoolExhausted,
)
from oneplusn.server.bridge import AsyncEngine, EngineFactory
from oneplusn.server.inference import Inference
from oneplusn.server.metrics import Metrics
from oneplusn.server.offload import offload
from oneplusn.server.settings import Settings

if TYPE_CHECKING:
    from oneplusn.adapters.bundle import Bundle

UPLOAD_PREFIX = "upload-"
_log = logging.getLogger("oneplusn.server")


class Server:
    """Owns the engine, the registry and the data folder. Lives on the event loop.

    Attributes:
        began: When it was made, in Unix time.
        data: The data folder, once started.
    """

    def __init__(self, settings: Settings, factory: EngineFactory) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.engine = AsyncEngine(factory, self.metrics, max_queue=settings.max_queue)
        self.began = time.time()
        self.data: Path
        self._started = False
        self._registry: Registry | None = None
        self._inference: Inference | None = None
        self._publishing = asyncio.Lock()
        self._resident: dict[str, int] = {}
        self._retired: set[str] = set()

    @property
    def ready(self) -> bool:
        """Whether requests are served: the model and every active adapter are loaded."""
        return self._started and self.engine.ready

    @property
    def inference(self) -> Inference:
        """What turns requests into text.

        Raises:
            EngineStopped: The server is starting, stopping or broken.
        """
        if self.engine.failure is not None:
            raise self.engine.failure
        if self._inference is None or not self._started:
            raise EngineStopped("the server is starting; try again in a few seconds")
        return self._inference

    @property
    def registry(self) -> Registry:
        """Names and versions of the adapters.

        Raises:
            EngineStopped: The server is starting.
        """
        if self._registry is None:
            raise EngineStopped("the server is starting; try again in a few seconds")
        return self._registry

    async def start(self) -> None:
        """Load the model, then the adapters: those of the data folder, then those of the settings.

        Raises:
            OneplusnError: Something cannot be served; the message says what.
        """
        name = self.settings.base_name
        self._registry = registry = self._open_data(name)
        model = await self.engine.start()
        self._inference = Inference(
            self.engine, registry, self.metrics, model=model, base_name=name
        )
        for version in registry.active():
            with _naming(version.label):
                blob = registry.blob(version.digest)
                await self._load(await offload(_read, blob, version.adapter))
        for adapter, path in {**self._packaged(), **self.settings.adapter}.items():
            with _naming(adapter):
                await self.publish(await offload(_read, path, adapter), adapter)
        for task, _ in registry.tasks():
            self.metrics.task_label(task)
        self._started = True
        _log.info("ready: %s with %d tasks", name, len(registry.tasks()))

    async def publish(self, bundle: Bundle, name: str) -> tuple[Version, bool]:
        """Make an adapter resident, keep it, and activate it; say whether it is new.

        The order makes it all or nothing: what the engine refuses is never written, and nothing
        asks for a version before its row is committed.

        Raises:
            AdapterError: A name is taken, or the model or the memory cannot take it.
        """
        async with self._publishing:
            self.registry.check(bundle, name)
            before = {version.digest for version in self.registry.active()}
            await self._load(bundle)
            try:
                version, new = await offload(self.registry.publish, bundle, name)
            finally:
                after = {version.digest for version in self.registry.active()}
                self._retired = (self._retired | before | {bundle.digest}) - after
                await self._unload_retired()
            for task in version.tasks:
                self.metrics.task_label(task)
            return version, new

    async def stop(self) -> None:
        """End what is in flight, and leave the data folder."""
        self._started = False
        await self.engine.close()
        if self._registry is not None:
            self._registry.close()
            if self.settings.data is None:
                shutil.rmtree(self.data, ignore_errors=True)

    def _open_data(self, base_name: str) -> Registry:
        """Open the data folder, and clear what uploads left there that a crash interrupted."""
        if self.settings.data is None:
            self.data = Path(tempfile.mkdtemp(prefix="oneplusn-"))
            _log.info("without --data, adapters are kept until the server stops")
        else:
            self.data = self.settings.data
            _log.info("adapters are kept in %s", self.data)
        registry = Registry(self.data, base_name=base_name)
        for leftover in self.data.glob(f"{UPLOAD_PREFIX}*"):
            shutil.rmtree(leftover)
        return registry

    def _packaged(self) -> dict[str, Path]:
        """Find the demo's adapters, for the demo; a name that has a version already keeps it."""
        if self.settings.model != "demo":
            return {}
        folder = Path(__file__).parents[1] / "demo" / "data" / "adapters"
        known = {version.adapter for version in self.registry.active()}
        return {path.name: path for path in sorted(folder.iterdir()) if path.name not in known}

    async def _load(self, bundle: Bundle) -> None:
        self._resident[bundle.digest] = await self.engine.load(bundle)
        self._count_resident()

    async def _unload_retired(self) -> None:
        """Free versions that nobody can ask for any more, except those that requests still use."""
        for digest in sorted(self._retired):
            try:
                await self.engine.unload(digest)
            except AdapterNotFound:
                pass
            except AdapterError as error:
                _log.info("an old adapter version stays until the next upload: %s", error.message)
                continue
            self._retired.discard(digest)
            self._resident.pop(digest, None)
        self._count_resident()

    def _count_resident(self) -> None:
        self.metrics.set("adapters_resident", len(self._resident))
        self.metrics.set("adapter_resident_bytes", sum(self._resident.values()))


@contextmanager
def _naming(adapter: str) -> Iterator[None]:
    """Turn what is wrong with an adapter into a reason not to start.

    Raises:
        MemoryPlanRefused: It does not fit beside those loaded before it.
        ConfigError: It cannot be read, or not be served on this model.
    """
    try:
        yield
    except PoolExhausted as error:
        msg = f"the adapter {adapter!r} does not fit: {error.message}; raise --adapter-memory"
        raise MemoryPlanRefused(msg) from error
    except AdapterError as error:
        msg = f"the adapter {adapter!r} cannot be served: {error.message}"
        raise ConfigError(msg, code=error.code) from error


def _read(path: Path, name: str) -> Bundle:
    # Imported here because it needs torch, which the modules of the API do not load.
    from oneplusn.adapters.files import read_adapter

    return read_adapter(path, name=name)

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

from oneplusn.adapters.registry import Registry
from oneplusn.errors import (
    AdapterError,
    ConfigError,
    EngineStopped,
    InvalidRequest,
    MemoryPlanRefused,
    OneplusnError,
    PoolExhausted,
)
from oneplusn.server.bridge import AsyncEngine
from oneplusn.server.grammars import Grammars
from oneplusn.server.inference import Inference
from oneplusn.server.jobs.grammar import grammars_for
from oneplusn.server.metrics import Metrics
from oneplusn.server.metrics_compat import VllmNames
from oneplusn.server.registry_metrics import follow_registry
from oneplusn.server.settings import Settings
from oneplusn.server.supervisor import Launch
from oneplusn.server.swaps import Swaps
from oneplusn.server.workers import Workers

SWEEP_EVERY_S = 3600
STARTING = "the server is starting; try again in a few seconds"
_log = logging.getLogger("oneplusn.server")


class Server:
    """Owns the engine, the workers, the registry and the data folder. Lives on the event loop.

    Attributes:
        began: When it was made, in Unix time.
        data: The data folder, once started.
        is_draining: Whether it finishes what it has and takes nothing new.
    """

    def __init__(self, settings: Settings, launch: Launch, workers: Workers | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics(settings.base_name)
        self.engine = AsyncEngine(
            launch,
            self.metrics,
            max_queue=settings.max_queue,
            step_timeout=settings.step_timeout,
        )
        self.metrics.follow("engine_restarts", lambda: self.engine.restarts)
        if settings.metrics_compat == "vllm":
            self.metrics.vllm = VllmNames(
                settings.base_name, settings.max_num_seqs, lambda: self.engine.tasks_in_flight
            )
        self.workers = workers or Workers.of(settings)
        self.began = time.time()
        self.is_draining = False
        self.data: Path
        self._is_started = False
        self._registry: Registry | None = None
        self._inference: Inference | None = None
        self._grammars: Grammars | None = None
        self._swaps: Swaps | None = None
        self._chores: tuple[asyncio.Task[None], ...] = ()

    @property
    def obstacle(self) -> OneplusnError | None:
        """Why requests are not served; None while they are."""
        if self.is_draining:
            msg = "the server is shutting down; ask another one"
            return EngineStopped(msg, code="draining")
        if not self.engine.ready:
            return self.engine.failure or EngineStopped(STARTING)
        return None if self._is_started else EngineStopped(STARTING)

    @property
    def is_started(self) -> bool:
        """Whether it has been ready once."""
        return self._is_started

    @property
    def ready(self) -> bool:
        """Whether requests are served: the model and its adapters are loaded."""
        return self.obstacle is None

    def admit(self) -> None:
        """Refuse a request, before any of it is done, while requests are not served.

        Raises:
            EngineStopped: The server is starting, stopping or broken.
        """
        if self.obstacle is not None:
            raise self.obstacle

    @property
    def inference(self) -> Inference:
        """What turns requests into text.

        Raises:
            EngineStopped: The server is starting.
        """
        if self._inference is None:
            raise self.engine.failure or EngineStopped(STARTING)
        return self._inference

    @property
    def grammars(self) -> Grammars:
        """What proves the grammars that requests bring.

        Raises:
            EngineStopped: The server is starting.
        """
        if self._grammars is None:
            raise EngineStopped(STARTING)
        return self._grammars

    @property
    def registry(self) -> Registry:
        """Names and versions of the adapters.

        Raises:
            EngineStopped: The server is starting.
        """
        if self._registry is None:
            raise EngineStopped(STARTING)
        return self._registry

    @property
    def swaps(self) -> Swaps:
        """What changes adapters.

        Raises:
            EngineStopped: The server is starting.
        """
        if self._swaps is None:
            raise self.engine.failure or EngineStopped(STARTING)
        return self._swaps

    async def start(self) -> None:
        """Load the model, then the adapters: those of the data folder, then those of the settings.

        Raises:
            OneplusnError: Something cannot be served; the message says what.
        """
        name = self.settings.base_name
        self._registry = registry = self._open_data(name)
        follow_registry(self.metrics, registry, self.data)
        bundles = {**self._packaged(), **self.settings.adapter}
        if bundles:
            self.workers.start()
        model = await self.engine.start()
        if model.base_fingerprint:
            registry.bind(model.base_fingerprint)
        self._grammars = grammars_for(self.workers, model, self.engine.warm)
        self._inference = Inference(
            self.engine, registry, self.metrics, model=model, base_name=name
        )
        swaps = Swaps(registry, self.engine, self.workers, self.metrics, layout=model.layout)
        self._swaps = swaps
        self.engine.locate = swaps.locate
        self.engine.on_ready = swaps.load_active
        with _naming("of the data folder"):
            await swaps.load_active()
        for adapter, path in bundles.items():
            with _naming(repr(adapter)):
                await swaps.publish(path, adapter)
        for task, _ in registry.tasks():
            self.metrics.task_label(task)
        self._is_started = True
        _log.info("ready: %s with %d tasks", name, len(registry.tasks()))
        self._chores = (asyncio.create_task(_sweep(registry)),)

    def drain(self) -> None:
        """Take nothing new from now on; what is in flight goes on."""
        self.is_draining = True

    def end_requests(self) -> None:
        """End what is in flight, with an error that says why."""
        self.engine.end(EngineStopped("the server is shutting down", code="draining"))

    async def stop(self) -> None:
        """End what is in flight, and leave the data folder."""
        self.drain()
        for chore in self._chores:
            chore.cancel()
        await self.engine.close()
        await self.workers.close()
        if self._registry is not None:
            self._registry.close()
            if self.settings.data is None:
                await asyncio.to_thread(shutil.rmtree, self.data, ignore_errors=True)

    def _open_data(self, base_name: str) -> Registry:
        if self.settings.data is None:
            self.data = Path(tempfile.mkdtemp(prefix="oneplusn-"))
            _log.info("without --data, adapters are kept until the server stops")
        else:
            self.data = self.settings.data
            _log.info("adapters are kept in %s", self.data)
        return Registry(self.data, base_name=base_name)

    def _packaged(self) -> dict[str, Path]:
        """Find the demo's adapters, for the demo; a name that has a version already keeps it."""
        if self.settings.model != "demo":
            return {}
        folder = Path(__file__).parents[1] / "demo" / "data" / "adapters"
        known = {adapter.name for adapter in self.registry.adapters()}
        return {path.name: path for path in sorted(folder.iterdir()) if path.name not in known}


async def _sweep(registry: Registry) -> None:
    """Remove, now and then, what nobody has named for a day."""
    while True:
        await asyncio.sleep(SWEEP_EVERY_S)
        try:
            await asyncio.to_thread(registry.sweep)
        except OSError as error:
            _log.warning("files that nobody needs could not be removed: %s", error)


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
        msg = f"the adapter {adapter} does not fit: {error.message}; raise --adapter-memory"
        raise MemoryPlanRefused(msg) from error
    except (AdapterError, InvalidRequest) as error:
        msg = f"the adapter {adapter} cannot be served: {error.message}"
        raise ConfigError(msg, code=error.code) from error

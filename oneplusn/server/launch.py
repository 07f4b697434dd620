"""Build the engine that a server runs, on the thread that will own it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from oneplusn.server.bridge import EngineCore, EngineFactory, ModelInfo
from oneplusn.server.messages import StepOutputs
from oneplusn.server.settings import Settings

if TYPE_CHECKING:
    from oneplusn.adapters.bundle import Bundle
    from oneplusn.server.engine.engine import Engine

_log = logging.getLogger("oneplusn.engine")


def engine_factory(settings: Settings) -> EngineFactory:
    """Return what loads the model of `settings`; nothing of torch is imported before it is called.

    The factory raises a `StartupError` when the model is refused or does not fit.
    """

    def build() -> tuple[EngineCore, ModelInfo]:
        from oneplusn.server.engine.engine import Engine, EngineConfig
        from oneplusn.server.engine.model import load_model

        model = load_model(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            device=settings.device,
            threads=settings.threads,
        )
        config = EngineConfig(
            kv_memory=settings.kv_memory,
            adapter_memory=settings.adapter_memory,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            token_budget=settings.token_budget,
        )
        engine = Engine(model, config)
        for line in str(engine.memory).splitlines():
            _log.info("memory: %s", line)
        info = ModelInfo(Path(model.folder), engine.scheduler.max_model_len)
        return _KeepingCore(engine), info

    return build


class _KeepingCore:
    """The engine, with every version that was loaded kept resident until it is unloaded.

    The pool evicts what is idle when it needs room; a version whose tasks can be asked for at any
    time must not be idle to it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pinned: set[str] = set()
        self.submit = engine.submit
        self.cancel = engine.cancel

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def load(self, bundle: Bundle) -> int:
        num_bytes = self._engine.load(bundle)
        if bundle.digest not in self._pinned:
            self._engine.pool.pin(bundle.digest)
            self._pinned.add(bundle.digest)
        return num_bytes

    def unload(self, digest: str) -> int:
        if digest in self._pinned:
            self._engine.pool.unpin(digest)
            self._pinned.discard(digest)
        return self._engine.unload(digest)

    def step(self) -> StepOutputs:
        return self._engine.step()

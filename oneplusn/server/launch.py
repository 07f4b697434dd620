"""Start the engine's process, and build the engine in it: the two ends of one hand-over.

Settings cross as JSON on the child's stdin. What the engine has no use for stays behind, the API
key before all: neither the command line nor the environment of the child holds any of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from oneplusn.adapters.prepared import SiteInfo
from oneplusn.server.messages import Load, Ready
from oneplusn.server.settings import ENGINE_SETTINGS, ENV_PREFIX, Settings
from oneplusn.server.supervisor import Launch

if TYPE_CHECKING:
    from oneplusn.adapters.image import PageImage
    from oneplusn.server.engine.engine import Engine
    from oneplusn.server.engine_process import EngineCore, Opener

MODULE = "oneplusn.server.engine_process"
_TOLD = {*ENGINE_SETTINGS, "log_level", "log_format"}
_log = logging.getLogger("oneplusn.engine")


class ChildProcess:
    """A running engine, as its parent sees it. Lives on the event loop."""

    def __init__(self, settings: Settings, address: str, *, module: str = MODULE) -> None:
        """Start it; it will connect to `address`."""
        command = [sys.executable, "-P", "-m", module, address, str(os.getpid())]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
        # A group of its own keeps the terminal's Ctrl-C from it until it can ignore that itself.
        self._popen = subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.PIPE, env=environment, process_group=0
        )
        assert self._popen.stdin is not None
        with self._popen.stdin as stdin:
            stdin.write(settings.model_dump_json(include=_TOLD).encode())

    @property
    def pid(self) -> int:
        """Its number."""
        return self._popen.pid

    async def wait(self) -> str:
        """Wait for its end; say how it came."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        handle = os.pidfd_open(self._popen.pid)
        loop.add_reader(handle, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(handle)
            os.close(handle)
        code = self._popen.wait()
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def kill(self) -> None:
        """End it now; it has nothing to save."""
        self._popen.kill()


def launcher(settings: Settings) -> Launch:
    """Return what starts an engine for `settings`."""
    return lambda address: ChildProcess(settings, address)


# What follows runs in the child.


def read_settings(text: bytes) -> Settings:
    """Read what the parent wrote; what it left out has its default, whatever the environment."""
    return Settings.model_construct(**msgspec.json.decode(text))


def build_engine(settings: Settings) -> tuple[EngineCore, Opener, Ready]:
    """Load the model of `settings`; nothing of torch is imported before.

    Returns:
        The engine, what opens page images for it, and what the API must know.

    Raises:
        StartupError: The model is refused, or does not fit.
    """
    from oneplusn.server.engine.engine import Engine, EngineConfig
    from oneplusn.server.engine.model import load_model

    model = load_model(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=settings.device,
        threads=settings.threads,
    )
    config = EngineConfig(
        kv_memory=settings.kv_memory,
        adapter_memory=settings.adapter_memory,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        token_budget=settings.token_budget,
        max_adapters=settings.max_adapters,
    )
    engine = Engine(model, config)
    for line in str(engine.memory).splitlines():
        _log.info("memory: %s", line)
    return engine, _open, _ready(settings, engine)


def _open(message: Load) -> PageImage:
    from oneplusn.adapters.image import PageImage

    return PageImage.open(Path(message.path))


def _ready(settings: Settings, engine: Engine) -> Ready:
    model, memory = engine.model, engine.memory
    sites = (SiteInfo(s.name, s.in_features, s.slices, s.modules) for s in model.sites)
    return Ready(
        model=settings.model,
        folder=str(model.folder),
        max_model_len=engine.scheduler.max_model_len,
        vocab_size=model.vocab_size,
        eos_ids=tuple(sorted(model.eos_ids)),
        dtype=str(model.dtype).removeprefix("torch."),
        sites=tuple(sites),
        base_fingerprint=model.fingerprint,
        memory={
            "weights": memory.weights,
            "kv": memory.kv,
            "adapters": memory.adapters,
            "free": memory.free,
        },
    )

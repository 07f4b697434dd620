"""The engine's process: build the engine, then take messages, step, and say what came of it.

    python -P -m oneplusn.server.engine_process ADDRESS PARENT_PID   (settings as JSON on stdin)

One thread does it all. While there is work it never waits, and looks for messages between two
steps; otherwise it sleeps on the socket. It ends with its parent, and only its parent ends it:
the terminal's signals are the API's business.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from oneplusn.errors import AdapterCorrupt, OneplusnError
from oneplusn.server.channel import EngineEnd
from oneplusn.server.launch import build_engine, read_settings
from oneplusn.server.lean_imports import build_lean
from oneplusn.server.logs import configure_logging
from oneplusn.server.messages import (
    Cancel,
    Fatal,
    Freed,
    Load,
    Loaded,
    Ready,
    Refusal,
    Stats,
    StepOutputs,
    StepStats,
    Submit,
    ToEngine,
    Unload,
    Warm,
)

if TYPE_CHECKING:
    from oneplusn.adapters.image import PageImage

HEARTBEAT_S = 1.0
"""How often the occupancy is told, which also says that the loop turns."""
WRITE_SHARE = 0.08
"""How long a swap may hold up the next step, as a share of the last one."""
MIN_WRITE_S = 0.0005
"""Seconds that it may take at least, or it would never come to an end beside short steps."""
IDLE_WRITE_S = 0.02
"""Seconds that it may take when no step waits: a request may come meanwhile."""
_PR_SET_PDEATHSIG = 1
_log = logging.getLogger("oneplusn.engine")


class EngineCore(Protocol):
    """The engine as the loop drives it; `Engine` of `engine/engine.py`, or a test's script."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute."""

    @property
    def is_writing(self) -> bool:
        """Whether `write_some` has something to write."""

    @property
    def stats(self) -> Stats:
        """Occupancy."""

    def submit(self, message: Submit) -> None:
        """Queue a request, or raise why it cannot be served."""

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""

    def keep(self, digest: str, *, pin: bool | None = False) -> bool:
        """Take a load of what is here or on its way already; tell whether it is."""

    def begin_load(self, image: PageImage, *, pin: bool | None = False) -> None:
        """Queue a version to be written."""

    def write_some(self, seconds: float) -> None:
        """Write pieces of the versions that are on their way, for about so long."""

    def unload(self, digest: str, *, force: bool = False) -> None:
        """Drop a version as soon as no request refers to it."""

    def poll(self) -> list[Loaded | Freed]:
        """Return what came into memory or left it since the last call."""

    def warm(self) -> None:
        """Begin to load what grammars need."""

    def step(self) -> StepOutputs:
        """Compute one batch."""


Opener = Callable[[Load], "PageImage"]


def write_seconds(last_step: float | None) -> float:
    """Return how long a swap may write before the next step; None when no step waits."""
    if last_step is None:
        return IDLE_WRITE_S
    return max(MIN_WRITE_S, WRITE_SHARE * last_step)


class Loop:
    """Drives one engine from one socket."""

    def __init__(
        self,
        core: EngineCore,
        channel: EngineEnd,
        opener: Opener,
        *,
        heartbeat: float = HEARTBEAT_S,
    ) -> None:
        self._core = core
        self._channel = channel
        self._open = opener
        self._heartbeat = heartbeat
        self._beat = time.monotonic()
        self._busy = False
        self._step_seconds = 0.0

    def run(self, ready: Ready) -> None:
        """Say that the engine is ready, and serve until something raises."""
        self._channel.send(ready)
        while True:
            self._turn()

    def _turn(self) -> None:
        """Take what was asked, write a little, step, and tell."""
        core = self._core
        if not (core.has_work or core.is_writing):
            self._channel.wait(self._heartbeat)
        refused = [
            refusal
            for message in self._channel.receive()
            if (refusal := self._handle(message)) is not None
        ]
        if core.is_writing:
            core.write_some(write_seconds(self._step_seconds if core.has_work else None))
        # What left the memory is told before a request is refused for it.
        for event in core.poll():
            self._channel.send(event)
        self._step(refused)
        if time.monotonic() >= self._beat:
            self._beat = time.monotonic() + self._heartbeat
            self._channel.send(core.stats)

    def _step(self, refused: list[Refusal]) -> None:
        was_busy, self._busy = self._busy, self._core.has_work
        if self._busy:
            start = time.monotonic()
            step = self._core.step()
            self._step_seconds = time.monotonic() - start
            refused += step.refused
            self._channel.send(StepOutputs(step.outputs, step.stats, refused) if refused else step)
        elif was_busy or refused:
            # No step follows that could say that the last requests were cancelled.
            self._channel.send(StepOutputs([], StepStats(), refused))

    def _handle(self, message: ToEngine) -> Refusal | None:
        """Do what was asked; return why a request was not taken."""
        match message:
            case Submit():
                return self._submit(message)
            case Cancel():
                self._core.cancel(message.id)
            case Load():
                self._load(message)
            case Unload():
                self._core.unload(message.digest, force=message.force)
            case Warm():
                self._core.warm()
        return None

    def _submit(self, message: Submit) -> Refusal | None:
        try:
            self._core.submit(message)
        except OneplusnError as error:
            kind = type(error).__name__
            return Refusal(message.id, kind, error.message, error.code, error.param)
        return None

    def _load(self, message: Load) -> None:
        if self._core.keep(message.digest, pin=message.pin):
            return
        try:
            self._core.begin_load(self._open(message), pin=message.pin)
        except OneplusnError as error:
            self._channel.send(Loaded(message.digest, error=error.message, code=error.code))
        except OSError as error:
            reason = f"its page image cannot be read: {error.strerror}"
            self._channel.send(Loaded(message.digest, error=reason, code=AdapterCorrupt.code))


def main() -> int:
    """Run the engine that the parent asked for; return the exit code."""
    address, parent = sys.argv[1], int(sys.argv[2])
    _end_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    settings = read_settings(sys.stdin.buffer.read())
    configure_logging(settings)
    channel = EngineEnd(address)
    try:
        with loading():
            core, opener, ready = build_lean(partial(build_engine, settings))
        Loop(core, channel, opener).run(ready)
    except OneplusnError as error:
        _log.debug("the engine cannot be built", exc_info=True)
        channel.send(Fatal(error.message, type(error).__name__))
    except Exception:
        # Nothing can be said about the state of the core after a fault of ours.
        _log.exception("the engine failed")
        channel.send(Fatal("the engine failed; its log has the reason"))
    finally:
        channel.close()
    return 1


@contextmanager
def loading() -> Iterator[None]:
    """Let garbage be while the block loads what stays, and never look through that again.

    The collector would walk through all objects of torch and transformers now and then, which
    takes 0.2 s: several times while they are loaded, and later in the middle of a step.
    """
    gc.disable()
    try:
        yield
        gc.collect()
        gc.freeze()
    finally:
        gc.enable()


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, whatever this one does then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent ended before the engine began")


if __name__ == "__main__":
    sys.exit(main())

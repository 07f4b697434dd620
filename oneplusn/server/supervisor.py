"""Keep one engine running: start it, notice when it dies or hangs, and start it again.

A life ends with its process, or when nothing was heard of it for `step_timeout` while it owed an
answer. What was in flight fails at once; the next life begins after a pause that doubles with
every failure in a row. A life that finished a request, or was ready for a minute, was no such
failure, however it ended. After five of them nothing is tried any more: whoever asks
`/health/live` and restarts the server may do better.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from oneplusn.errors import EngineGone, EngineStopped, OneplusnError, StartupError, rebuild
from oneplusn.server.channel import ApiEnd, Context, socket_folder
from oneplusn.server.messages import Fatal, FromEngine, Ready, StepOutputs, ToEngine

MAX_FAILURES = 5
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
PROVEN_S = 60.0
LAST_WORDS_S = 0.05
"""How long what an engine said last may take through the socket."""
_HOPEFUL = "the engine failed and is started again; try again in a few seconds"
_HOPELESS = "the engine cannot be kept running; the server must be restarted"
_log = logging.getLogger("oneplusn.server")


class EngineProcess(Protocol):
    """One life of the engine: a process, or what stands for it in a test."""

    async def wait(self) -> str:
        """Wait for its end; say how it came, as in "the engine was ended by SIGKILL"."""

    def kill(self) -> None:
        """End it now; nothing happens if it has ended."""


Launch = Callable[[str], EngineProcess]
"""Starts an engine that connects to this address."""


class Owner(Protocol):
    """Whom the supervisor tells, and asks one thing."""

    @property
    def is_waiting(self) -> bool:
        """Whether the engine owes an answer."""

    def receive(self, message: FromEngine) -> None:
        """Take what the engine said."""

    def lost(self, error: OneplusnError) -> None:
        """Fail what is in flight; a `StartupError` says that the engine cannot be started."""


@dataclass(slots=True, eq=False)
class _Life:
    """One engine, from its start to its end."""

    link: ApiEnd
    process: EngineProcess
    messages: int = 0
    ready_at: float | None = None
    finished_one: bool = False
    fatal: Fatal | None = None

    @property
    def is_proven(self) -> bool:
        """Whether it did what it is there for."""
        lasted = 0.0 if self.ready_at is None else time.monotonic() - self.ready_at
        return self.finished_one or lasted > PROVEN_S

    def note(self, message: FromEngine) -> None:
        """Remember what a message says about this life."""
        self.messages += 1
        if isinstance(message, Ready):
            self.ready_at = time.monotonic()
        elif isinstance(message, Fatal):
            self.fatal = message
            self.process.kill()
        elif isinstance(message, StepOutputs) and not self.finished_one:
            self.finished_one = any(o.finish in ("stop", "length") for o in message.outputs)


class Supervisor:
    """Runs the lives of one engine, one after the other. Lives on the event loop.

    Attributes:
        alive: Whether there is an engine, or will be.
        restarts: Lives after the first.
    """

    def __init__(self, launch: Launch, owner: Owner, *, step_timeout: float) -> None:
        """Prepare; `step_timeout` is in seconds."""
        self.alive = True
        self.restarts = 0
        self._launch = launch
        self._owner = owner
        self._step_timeout = step_timeout
        self._life: _Life | None = None
        self._failures = 0

    @property
    def process(self) -> EngineProcess | None:
        """The engine that runs, if one does."""
        return None if self._life is None else self._life.process

    def send(self, message: ToEngine) -> None:
        """Tell the engine; nobody gets it while there is none."""
        if self._life is not None:
            self._life.link.send(message)

    async def run(self) -> None:
        """Keep an engine running until this is cancelled, or hopeless."""
        try:
            with _sockets() as (context, folder):
                await self._run(context, folder)
        except Exception as error:
            # Nobody else would notice that there is no engine, and will not be one.
            _log.exception("the engine cannot be kept running")
            self.alive = False
            if not isinstance(error, OneplusnError):
                error = EngineGone(_HOPELESS)
            self._owner.lost(error)

    async def _run(self, context: Context, folder: Path) -> None:
        while True:
            link = ApiEnd(context, folder / str(self.restarts), self._receive)
            try:
                self._life = _Life(link, self._launch(link.address))
                await self._live(self._life)
            finally:
                self._life = None
                link.close()
            if not self.alive:
                return
            await asyncio.sleep(_pause(self._failures))
            self.restarts += 1

    async def _live(self, life: _Life) -> None:
        """Wait for the end of a life, tell of it, and see to it that it is one."""
        ended = asyncio.create_task(life.process.wait())
        hung = asyncio.create_task(self._hung(life))
        try:
            await asyncio.wait({ended, hung}, return_when=asyncio.FIRST_COMPLETED)
            ending = f"said nothing for {self._step_timeout:g} s"
            if ended.done():
                ending = ended.result()
                await asyncio.sleep(LAST_WORDS_S)
            self._bury(life, ending)
        finally:
            hung.cancel()
            life.process.kill()
            await ended

    def _bury(self, life: _Life, ending: str) -> None:
        """Count a life that has ended, and fail what was in flight."""
        self._failures = 1 if life.is_proven else self._failures + 1
        if life.ready_at is None and self.restarts == 0:
            self.alive = False
            self._owner.lost(_start_error(life, ending))
            return
        self.alive = self._failures < MAX_FAILURES
        then = "it is started again" if self.alive else f"failure {MAX_FAILURES} in a row"
        _log.error("the engine %s; %s", ending, then)
        hopeful = EngineStopped(_HOPEFUL, code=EngineGone.code)
        self._owner.lost(hopeful if self.alive else EngineGone(_HOPELESS))

    async def _hung(self, life: _Life) -> None:
        """Return when the engine has been silent for too long.

        Counted in naps of ours, so that a pause of the whole machine is not held against it.
        """
        silent, nap = 0.0, min(1.0, self._step_timeout / 4)
        while silent < self._step_timeout:
            before = life.messages
            await asyncio.sleep(nap)
            quiet = life.messages == before and self._owner.is_waiting
            silent = silent + nap if quiet else 0.0

    def _receive(self, message: FromEngine) -> None:
        if self._life is not None:
            self._life.note(message)
            self._owner.receive(message)


@contextmanager
def _sockets() -> Iterator[tuple[Context, Path]]:
    """Lend what sockets need, and leave nothing of it."""
    folder = socket_folder()
    context = Context()
    try:
        yield context, folder
    finally:
        context.term()
        shutil.rmtree(folder, ignore_errors=True)


def _pause(failures: int) -> float:
    """Return the seconds before the next life."""
    return min(FIRST_PAUSE_S * 2.0 ** (failures - 1), LONGEST_PAUSE_S)


def _start_error(life: _Life, ending: str) -> OneplusnError:
    """Say why the first life never began."""
    if life.fatal is not None:
        return rebuild(life.fatal.kind, life.fatal.error)
    return StartupError(f"the engine {ending} while it loaded the model; its log may say why")

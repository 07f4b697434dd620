"""Workers: child processes that do what may take long, fail or be hostile, one job at a time.

A child keeps what it has imported, which is 230 MB and more, and ends when it has had nothing to do
for a minute. It is killed when a job takes too long, and dies when one takes too much memory or
breaks it; another takes its place at once. It runs at low priority and on one thread, so that the
engine does not notice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from oneplusn.adapters.image_file import check_image
from oneplusn.adapters.prepared import BaseLayout, Prepared
from oneplusn.errors import (
    AdapterCorrupt,
    AdapterInvalid,
    AdapterTooLarge,
    QueueFull,
    WorkerFailed,
)
from oneplusn.server.jobs import JOBS, Job, prepare, rebuild
from oneplusn.server.jobs.frames import (
    CRASHED,
    FATAL,
    OUT_OF_MEMORY,
    UNAVAILABLE,
    Call,
    Failed,
    Reply,
    read_frame,
    write_frame,
)
from oneplusn.server.settings import ENV_PREFIX, Settings

GIB = 1 << 30
START_SECONDS = 120.0
"""How long a new process may take to import what its jobs need."""
TRIES = 2
"""Processes that an upload may break before it is to blame."""
# One thread each: more would wait for the engine's at every product.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

T = TypeVar("T")
_log = logging.getLogger("oneplusn.workers")
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class Workers:
    """The worker processes of one server. Lives on the event loop.

    Args:
        limit: Jobs of a lane that run or wait; one more is refused.
        max_upload_bytes: Most bytes of an upload, expanded.
        max_image_bytes: Most bytes of an adapter's pages.
        idle_seconds: How long a process without a job is kept.
    """

    def __init__(
        self,
        limit: int = 8,
        *,
        max_upload_bytes: int = GIB,
        max_image_bytes: int = 4 * GIB,
        idle_seconds: float = 60.0,
    ) -> None:
        self._limit = limit
        self._max_upload_bytes = max_upload_bytes
        self._max_image_bytes = max_image_bytes
        self._idle_seconds = idle_seconds
        self._lanes: dict[str, _Lane] = {}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Make those of a server, with the limits of its settings."""
        return cls(
            max_upload_bytes=int(settings.max_upload),
            max_image_bytes=int(settings.max_image),
            idle_seconds=settings.worker_idle_timeout,
        )

    def start(self) -> None:
        """Start the process that reads adapters, which takes it seconds, and do not wait for it.

        Raises:
            WorkerFailed: There can be none.
        """
        self._lane("adapters").start()

    async def prepare(
        self,
        source: Path | Mapping[str, Path],
        out: Path,
        *,
        name: str,
        base: BaseLayout,
        dry_run: bool = False,
        strict: bool = True,
        assume_converted: bool = False,
    ) -> Prepared:
        """Check an upload, and write its blob and page image.

        One in which the process breaks down is tried once more in a new one: what breaks that,
        too, is to blame itself.

        Args:
            source: A folder or an archive, or files by the names that the client gave.
            out: Existing empty folder for what is made, on the disk of the data folder.
            name: Of the adapter, and of the task of a PEFT adapter.
            base: What it is laid out for.
            dry_run: Say what would come of it, and write nothing.
            strict: Refuse modules that the base does not have, and another base's fingerprint.
            assume_converted: Take an adapter whose training changed the base as converted.

        Raises:
            AdapterError: It cannot be served, with a code that says why.
            StorageFull: There is no room for what is made.
            QueueFull: Too many jobs wait.
            WorkerFailed: It took too long, or there is a fault in what reads it.
        """
        request = prepare.Request(
            source=_plain(source),
            out=str(out),
            dry_run=dry_run,
            name=name,
            base=base,
            strict=strict,
            assume_converted=assume_converted,
            max_bytes=self._max_upload_bytes,
            max_image_bytes=self._max_image_bytes,
        )
        for _ in range(TRIES):
            try:
                return await self.run("prepare", request, Prepared)
            except WorkerFailed as error:
                if error.code == OUT_OF_MEMORY:
                    msg = f"the adapter is too large to read: {error.message}"
                    raise AdapterTooLarge(msg) from None
                if error.code != CRASHED:
                    raise
                await asyncio.to_thread(_empty, out)
        msg = f"{name!r} breaks the process that reads it, {TRIES} of {TRIES} times; save it anew"
        raise AdapterInvalid(msg, code="adapter_breaks_reader")

    async def rebuild(self, digest: str, blob: Path, image: Path, base: BaseLayout) -> int:
        """Make a page image again; return the bytes of its pages.

        Raises:
            AdapterCorrupt: The blob does not hold what it is named for.
            AdapterIncompatible: The base is another by now.
            StorageFull: There is no room for the image.
            QueueFull, WorkerFailed: As `prepare`.
        """
        request = rebuild.Request(digest=digest, blob=str(blob), image=str(image), base=base)
        return (await self.run("rebuild", request, rebuild.Rebuilt)).num_bytes

    async def ensure_image(self, digest: str, blob: Path, image: Path, base: BaseLayout) -> Path:
        """Return a page image that is there and whole, made again if need be.

        Raises:
            AdapterCorrupt, AdapterIncompatible, StorageFull, QueueFull, WorkerFailed: As `rebuild`.
        """
        try:
            await asyncio.to_thread(check_image, image, digest)
        except AdapterCorrupt as error:
            _log.info("a page image is made again: %s", error.message)
            await self.rebuild(digest, blob, image, base)
        return image

    async def run(self, kind: str, request: msgspec.Struct, result: type[T]) -> T:
        """Run a job of the table.

        A job whose caller has gone runs to its end all the same, as killing it would cost the next
        one a new process.

        Raises:
            QueueFull: Too many jobs of its lane run or wait.
            WorkerFailed: `worker_timeout` or `worker_memory`; `worker_crashed` when its process
                ended in another way, `worker_failed` when the process could say so itself;
                `worker_unavailable` when there was no process to do it.
            OneplusnError: What the job raised.
        """
        lane = self._lane(JOBS[kind].lane)
        if len(lane.jobs) >= self._limit:
            msg = f"{len(lane.jobs)} {lane.name} wait already; try again in a few seconds"
            raise QueueFull(msg)
        reply = await asyncio.shield(lane.submit(kind, request))
        if isinstance(reply, Failed):
            raise reply.error()
        return msgspec.msgpack.decode(reply.result, type=result)

    async def close(self) -> None:
        """End the processes; jobs that run or wait are broken off."""
        for lane in self._lanes.values():
            await lane.close()

    def _lane(self, name: str) -> _Lane:
        if name not in self._lanes:
            self._lanes[name] = _Lane(name, self._idle_seconds)
        return self._lanes[name]


class _Lane:
    """One process, and the jobs that wait for it.

    Args:
        name: As the table of jobs has it.
        idle_seconds: How long the process is kept without a job.
    """

    def __init__(self, name: str, idle_seconds: float) -> None:
        self.name = name
        self._idle_seconds = idle_seconds
        self._rest: asyncio.Task[None] | None = None
        self.jobs: set[asyncio.Task[Reply]] = set()
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"worker-{name}")
        self._child: _Child | None = None
        self._is_closed = False

    def start(self) -> _Child:
        """Return the process, a new one if there is none.

        Raises:
            WorkerFailed: The lane is closed, or the system has no room for a process.
        """
        if self._is_closed:
            raise WorkerFailed("the server is shutting down", code="draining")
        if self._child is None:
            try:
                self._child = _Child(self.name)
            except OSError as error:
                msg = f"a worker process could not be started: {error.strerror}"
                raise WorkerFailed(msg, code=UNAVAILABLE) from error
        self._stay()
        return self._child

    def submit(self, kind: str, request: msgspec.Struct) -> asyncio.Task[Reply]:
        """Run a job when it is its turn.

        The task raises WorkerFailed when the process came to an end in it.
        """
        task = asyncio.create_task(self._run(kind, request))
        self.jobs.add(task)
        task.add_done_callback(self._forget)
        return task

    async def close(self) -> None:
        """End the process, and with it the jobs."""
        self._is_closed = True
        if self._rest is not None:
            self._rest.cancel()
        if self._child is not None:
            self._child.kill()
        if self.jobs:
            await asyncio.wait(self.jobs)
        if self._child is not None:
            await self._retire(self._child)
        self._thread.shutdown()

    def _forget(self, task: asyncio.Task[Reply]) -> None:
        """Make room for another; the caller may have gone, so nobody need look at the end."""
        self.jobs.discard(task)
        if not task.cancelled():
            task.exception()
        if not self._is_closed:
            self._stay()

    def _stay(self) -> None:
        """Let the time begin anew after which the process is not kept any more."""
        if self._rest is not None:
            self._rest.cancel()
        self._rest = asyncio.create_task(self._end_after(self._idle_seconds))

    async def _end_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.jobs:
            return  # the last of them begins the time anew
        async with self._turn:
            if self._child is not None:
                await asyncio.shield(self._retire(self._child))

    async def _run(self, kind: str, request: msgspec.Struct) -> Reply:
        async with self._turn:
            return await self._work(kind, request)

    async def _work(self, kind: str, request: msgspec.Struct) -> Reply:
        job = JOBS[kind]
        raw = msgspec.Raw(msgspec.msgpack.encode(request))
        call = msgspec.msgpack.encode(Call(kind, raw, job.seconds, job.memory_bytes))
        child = await self._warm_child()
        reply, in_time = await self._within(job.seconds, child, partial(child.exchange, call))
        if reply is None or (isinstance(reply, Failed) and reply.code in FATAL):
            await self._retire(child)
            with suppress(WorkerFailed):  # the next job says so, if it still holds
                self.start()
        if reply is None:
            raise _ending(job, child.ending, in_time=in_time, closed=self._is_closed)
        return reply

    async def _warm_child(self) -> _Child:
        """Return a process that can work.

        Raises:
            WorkerFailed: There is none to be had.
        """
        child = self.start()
        if child.ending is not None:  # it came to its end while it had nothing to do
            await self._retire(child)
            child = self.start()
        is_warm, _ = await self._within(START_SECONDS, child, child.wait_until_warm)
        if not is_warm:
            await self._retire(child)
            msg = "a worker process could not be started; the server's log says why"
            raise WorkerFailed(msg, code=UNAVAILABLE)
        return child

    async def _within(self, seconds: float, child: _Child, wait: Callable[[], T]) -> tuple[T, bool]:
        """Wait for a child on the lane's thread; kill the child when it takes too long.

        Returns:
            What the wait came to, and whether it was in time.
        """
        waiting = asyncio.get_running_loop().run_in_executor(self._thread, wait)
        done, _ = await asyncio.wait([waiting], timeout=seconds)
        if not done:
            child.kill()
        return await waiting, bool(done)

    async def _retire(self, child: _Child) -> None:
        self._child = None
        await asyncio.get_running_loop().run_in_executor(self._thread, child.reap)


class _Child:
    """One process and its pipes; it warms up as soon as it is made."""

    def __init__(self, lane: str) -> None:
        # A group of its own, so that Ctrl-C is for the server to answer.
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", "oneplusn.server.worker", lane],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            process_group=0,
        )
        self._is_warm = False

    @property
    def ending(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def wait_until_warm(self) -> bool:
        """Block until it can work; tell whether it can."""
        self._is_warm = self._is_warm or self._receive() is not None
        return self._is_warm

    def exchange(self, call: bytes) -> Reply | None:
        """Send a call and block until the reply; None when the process ends before."""
        assert self._process.stdin is not None
        try:
            write_frame(self._process.stdin, call)
        except OSError:
            return None
        reply = self._receive()
        return None if reply is None else _replies.decode(reply)

    def kill(self) -> None:
        """End it now; whoever waits for a reply gets none."""
        self._process.kill()

    def reap(self) -> None:
        """Leave nothing of it behind."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # what was never sent
            self._process.stdin.close()
        self._process.stdout.close()

    def _receive(self) -> bytes | None:
        assert self._process.stdout is not None
        return read_frame(self._process.stdout)


def _empty(folder: Path) -> None:
    """Remove what is in a folder, and leave the folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _plain(source: Path | Mapping[str, Path]) -> str | dict[str, str]:
    if isinstance(source, Path):
        return str(source)
    return {name: str(path) for name, path in source.items()}


def _environment() -> dict[str, str]:
    """Return the environment of a worker: one thread, and none of our settings, as the API key."""
    ours = {name for name in os.environ if name.startswith(ENV_PREFIX)}
    return {**{name: os.environ[name] for name in os.environ.keys() - ours}, **THREADS}


def _ending(job: Job, code: int | None, *, in_time: bool, closed: bool) -> WorkerFailed:
    """Say how a process came to its end in a job."""
    if closed:
        return WorkerFailed("the server is shutting down", code="draining")
    if not in_time or code == -signal.SIGXCPU:
        msg = f"the job took more than {job.seconds:g} s, its limit; send something smaller"
        return WorkerFailed(msg, code="worker_timeout")
    _log.error("a worker process ended by itself with %s", code)
    msg = "the process that did this job broke down; it has been replaced"
    return WorkerFailed(msg, code=CRASHED)

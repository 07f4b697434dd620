"""Share a load among several client processes, and put together what they measured."""

from __future__ import annotations

import asyncio
import os
import time
from asyncio.subprocess import PIPE, Process
from functools import reduce
from operator import add

import msgspec

from oneplusn.loadtest.drive import Counts, Outcome
from oneplusn.loadtest.job import Job
from oneplusn.loadtest.processes import ChildFailed, python
from oneplusn.loadtest.rows import Part, merge
from oneplusn.loadtest.worker import LINE_LIMIT, Message

LEAD_S = 0.1
"""From the moment when every process is ready to that at which all of them start."""


class Crew:
    """Sends a job from processes that start at the same moment."""

    def __init__(self, job: Job, processes: int) -> None:
        self._clients = [_Client(part) for part in job.split(processes)]
        self._halted = False

    @property
    def counts(self) -> Counts:
        """How it is going, over all processes."""
        return reduce(add, (client.counts for client in self._clients))

    def halt(self) -> None:
        """Have them send nothing more, and give up what is not answered yet."""
        self._halted = True
        for client in self._clients:
            client.halt()

    async def run(self) -> Outcome:
        """Send everything.

        Raises:
            ChildFailed: A process ended before it had told what it measured.
        """
        try:
            await asyncio.gather(*(client.prepare() for client in self._clients))
            start = time.perf_counter() + LEAD_S
            for client in self._clients:
                client.start(start)
            if self._halted:
                self.halt()
            parts = await asyncio.gather(*(client.part() for client in self._clients))
        finally:
            await asyncio.gather(*(client.close() for client in self._clients))
        return merge(parts)


class _Client:
    """One process.

    Attributes:
        counts: How it was going when it told last.
    """

    def __init__(self, job: Job) -> None:
        self.counts = Counts()
        self._job = job
        self._process: Process | None = None
        self._started = False
        self._decoder = msgspec.json.Decoder[Message](Message)

    async def prepare(self) -> None:
        """Start it, and wait until it is ready to send."""
        # In a group of its own: a Ctrl-C on the terminal is for this process, which passes it on.
        self._process = await asyncio.create_subprocess_exec(
            *python("oneplusn.loadtest.worker"),
            stdin=PIPE,
            stdout=PIPE,
            limit=LINE_LIMIT,
            process_group=0,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._tell(msgspec.json.encode(self._job))
        await self._hear()

    def start(self, when: float) -> None:
        """Tell it when to begin."""
        self._started = True
        self._tell(msgspec.json.encode(when))

    def halt(self) -> None:
        """Tell it to end, if it has begun."""
        if self._started:
            self._tell(b"")

    async def part(self) -> Part:
        """Wait for what it measured."""
        while True:
            message = await self._hear()
            if isinstance(message, Part):
                return message
            self.counts = message

    async def close(self) -> None:
        """End it if it is still there; what it measured is known, or will not be."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()

    def _tell(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")

    async def _hear(self) -> Message:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            code = await self._process.wait()
            msg = f"a client process ended early, with exit code {code}; see above"
            raise ChildFailed(msg)
        message: Message = self._decoder.decode(line)
        return message

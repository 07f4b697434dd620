"""The sequences of one request: submitted together, generated together, ended together.

Those of one prompt share its keys and values; that is the scheduler's doing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any

from oneplusn.errors import OneplusnError, RequestCancelled
from oneplusn.server.inference import Delta, Generation, Inference, Job
from oneplusn.server.targets import Target


class Batch:
    """The jobs of one request: submitted on entering, cancelled on leaving if they have not ended.

    Attributes:
        request_id: The request's id, by which it can be aborted.
        generations: One per job, in their order, once entered.
    """

    def __init__(
        self, inference: Inference, jobs: Sequence[Job], *, request_id: str, salt: str
    ) -> None:
        """Take the jobs; `salt` is whose cached prefixes they may use."""
        self.request_id = request_id
        self.generations: list[Generation] = []
        self._inference = inference
        self._jobs = jobs
        self._salt = salt

    @property
    def targets(self) -> list[Target]:
        """What the jobs' tasks stood for when they were submitted."""
        return [generation.target for generation in self.generations]

    def __enter__(self) -> Batch:
        plans = [self._inference.plan(job) for job in self._jobs]
        self._inference.in_flight.add(self.request_id, self)
        try:
            for plan in plans:
                self.generations.append(self._inference.submit(plan, salt=self._salt))
        except OneplusnError:
            self._close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def abort(self) -> None:
        """End all that has not ended; whoever waits for it is told."""
        error = RequestCancelled(f"the request {self.request_id!r} was aborted")
        for generation in self.generations:
            if generation.finish_reason is None:
                generation.stream.close()
                generation.stream.fail(error)

    async def run(self) -> Batch:
        """Generate all to their ends.

        Raises:
            OneplusnError: One of them failed; the others are cancelled.
        """
        with self:
            streams = [self._inference.deltas(generation) for generation in self.generations]
            await _together([_exhaust(stream) for stream in streams])
        return self

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield the pieces of all answers as they come, each with the answer's index.

        Raises:
            OneplusnError: One of them failed.
        """
        pieces: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(1)

        async def pump(index: int, generation: Generation) -> None:
            try:
                async for delta in self._inference.deltas(generation):
                    await pieces.put((index, delta))
                await pieces.put(None)
            except Exception as error:
                # It is raised where the pieces are read, not lost in this task.
                await pieces.put(error)

        pumps = [asyncio.create_task(pump(*pair)) for pair in enumerate(self.generations)]
        try:
            unfinished = len(pumps)
            while unfinished:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    unfinished -= 1
                else:
                    yield piece
        finally:
            for task in pumps:
                task.cancel()

    def _close(self) -> None:
        self._inference.in_flight.remove(self.request_id, self)
        for generation in self.generations:
            self._inference.finish(generation)


async def _exhaust(deltas: AsyncIterator[Delta]) -> None:
    """Read to the end, for what that leaves in the generation."""
    async for _ in deltas:
        pass


async def _together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; the first failure ends the others."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()

"""The sequences of one request: submitted together, generated together, ended together.

Those of one prompt share its keys and values; that is the scheduler's doing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

from oneplusn.errors import OneplusnError, RequestCancelled
from oneplusn.server.inference import Delta, Generation, Inference, Job, Plan
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
        self._wake = asyncio.Event()

    @property
    def targets(self) -> list[Target]:
        """What the jobs' tasks stood for when they were submitted."""
        return [generation.target for generation in self.generations]

    def __enter__(self) -> Batch:
        plans = [self._inference.plan(job) for job in self._jobs]
        self._inference.in_flight.add(self.request_id, self)
        try:
            for plan in plans:
                self.generations.append(self._submit(plan))
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
            async for pieces in self.deltas():
                for _ in pieces:
                    pass
        return self

    async def deltas(self) -> AsyncGenerator[Iterator[tuple[int, Delta]], None]:
        """Yield what has come of all answers, step by step: pieces, each with its answer's index.

        All of them are to be read before the next are asked for. There may be none.

        Raises:
            OneplusnError: One of the answers failed.
        """
        unfinished = dict(enumerate(self.generations))
        while unfinished:
            await self._wake.wait()
            self._wake.clear()
            # What fails while the pieces are being sent may have got some more before.
            failures = {index: g.stream.failure for index, g in unfinished.items()}
            yield self._read(unfinished)
            for index, failure in failures.items():
                if unfinished[index].finish_reason is not None:
                    del unfinished[index]
                elif failure is not None:
                    raise failure

    def _read(self, unfinished: Mapping[int, Generation]) -> Iterator[tuple[int, Delta]]:
        for index, generation in unfinished.items():
            for delta in self._inference.read(generation):
                yield index, delta

    def _submit(self, plan: Plan) -> Generation:
        return self._inference.submit(plan, salt=self._salt, wake=self._wake)

    def _close(self) -> None:
        self._inference.in_flight.remove(self.request_id, self)
        for generation in self.generations:
            self._inference.finish(generation)

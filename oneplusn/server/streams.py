"""The tokens of one request on their way from the engine to whoever answers it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from oneplusn.errors import DeadlineExceeded, OneplusnError, RequestCancelled, ServingError
from oneplusn.server.messages import Submit, TokenOutput

MAX_BUFFERED = 1024
"""Tokens that may wait to be read before the request is cancelled."""


class TokenStream:
    """The tokens of one request, as an async iterator. Lives on the event loop.

    Attributes:
        submit: The request.
        submitted: When the request went to the engine, by `time.perf_counter`.
        first: When its first token came, if one has.
        last: When its latest token came.
        sent_again: Whether the engine refused it once for a version that had just left.
    """

    def __init__(self, submit: Submit, release: Callable[[str], None]) -> None:
        self.submit = submit
        self.submitted = time.perf_counter()
        self.first: float | None = None
        self.last = self.submitted
        self.sent_again = False
        self._release = release
        self._buffer: deque[TokenOutput] = deque()
        self._wake = asyncio.Event()
        self._error: OneplusnError | None = None
        self._ended = False

    @property
    def failure(self) -> OneplusnError | None:
        """Why it ended before the answer did, if it has."""
        return self._error

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._buffer.popleft()

    def push(self, output: TokenOutput) -> bool:
        """Hand over what the engine made; the reader sees an end without a token as an error.

        Returns:
            Whether the reader keeps up; if not, the request has been cancelled.
        """
        if output.finish == "error":
            self.fail(ServingError(output.error or "the engine could not go on with this request"))
        elif output.finish == "abort":
            self.fail(RequestCancelled(output.error or "the request was cancelled"))
        elif output.finish == "timeout":
            self.fail(DeadlineExceeded("the request's timeout passed; allow more, or ask for less"))
        elif len(self._buffer) >= MAX_BUFFERED:
            self._release(self.submit.id)
            self._buffer.clear()
            msg = f"{MAX_BUFFERED} tokens wait to be read; read the stream faster"
            self.fail(RequestCancelled(msg))
            return False
        else:
            self._buffer.append(output)
            self._ended = output.finish is not None
            self._wake.set()
        return True

    def fail(self, error: OneplusnError) -> None:
        """End the stream with an error, after what it still holds."""
        self._error = error
        self._wake.set()

    def close(self) -> None:
        """Stop reading; a request that has not ended is cancelled."""
        self._release(self.submit.id)

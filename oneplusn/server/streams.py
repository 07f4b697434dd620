"""The tokens of one request on their way from the engine to whoever answers it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from oneplusn.errors import DeadlineExceeded, OneplusnError, RequestCancelled, ServingError
from oneplusn.server.messages import Submit, TokenOutput

MAX_BUFFERED = 1024
"""Tokens that may wait to be read before the request is cancelled."""


class TokenStream:
    """The tokens of one request. Lives on the event loop.

    Whoever reads it waits for `wake`, which several streams may share, clears it, and takes all
    that has come by then.

    Attributes:
        submit: The request.
        wake: Set when something has come, or the stream has failed.
        failure: Why it ended before the answer did, if it has.
        submitted: When the request went to the engine, by `time.perf_counter`.
        first: When its first token came, if one has.
        last: When its latest token came.
        sent_again: Whether the engine refused it once for a version that had just left.
    """

    def __init__(
        self,
        submit: Submit,
        release: Callable[[str], None],
        wake: asyncio.Event | None = None,
    ) -> None:
        self.submit = submit
        self.wake = wake or asyncio.Event()
        self.failure: OneplusnError | None = None
        self.submitted = time.perf_counter()
        self.first: float | None = None
        self.last = self.submitted
        self.sent_again = False
        self._release = release
        self._buffer: list[TokenOutput] = []

    def take(self) -> list[TokenOutput]:
        """Return what has come since the last call; a failure counts after all of it."""
        taken, self._buffer = self._buffer, []
        return taken

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
            self.wake.set()
        return True

    def fail(self, error: OneplusnError) -> None:
        """End the stream with an error, after what it still holds."""
        self.failure = error
        self.wake.set()

    def close(self) -> None:
        """Stop reading; a request that has not ended is cancelled."""
        self._release(self.submit.id)

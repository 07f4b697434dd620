"""How slowly a request's body may come: what every middleware and route reads it through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

MIN_BYTES_PER_S = 1024
"""What a body must come to on average, over every deadline."""


class TimedReceive:
    """`receive` of one request, with a deadline for its body.

    Of every `seconds` that are spent waiting for it, some must bring `MIN_BYTES_PER_S` times
    `seconds` bytes, or its end. So a large body may take as long as it needs, and neither silence
    nor a trickle holds the request. Time in which nobody waits is ours, and does not count.
    """

    def __init__(self, receive: Receive, seconds: float, has_answered: Callable[[], bool]) -> None:
        """Wrap `receive`; `has_answered` says whether the answer has begun."""
        self._receive = receive
        self._seconds = seconds
        self._has_answered = has_answered
        self._left = seconds
        self._num_bytes = 0
        self._is_whole = False

    async def __call__(self) -> Message:
        """Return the next message.

        Raises:
            HTTPException: 408, the body comes too slowly.
        """
        if self._is_whole:
            return await self._receive()
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._left):
                message = await self._receive()
        except TimeoutError:
            return self._give_up()
        self._left -= loop.time() - began
        self._take(message)
        return message

    def _take(self, message: Message) -> None:
        self._is_whole = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes >= MIN_BYTES_PER_S * self._seconds:
            self._num_bytes, self._left = 0, self._seconds

    def _give_up(self) -> Message:
        """Refuse the request, or end an answer that did not wait for the body."""
        if self._has_answered():
            return {"type": "http.disconnect"}
        least = round(MIN_BYTES_PER_S * self._seconds)
        msg = f"{self._num_bytes} bytes of the body came in {self._seconds:g} s"
        raise HTTPException(408, f"{msg}; send it all, or at least {least} bytes in that time")

"""What takes long goes to a thread, so that the event loop goes on with other streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from pydantic import BaseModel

INLINE_CHARS = 16_384
"""Below this, going to a thread and back costs more than it spares."""

T = TypeVar("T")


async def offload(work: Callable[[], T], *given: object) -> T:
    """Do `work` here if what it is about is small, else on a thread.

    Args:
        work: Safe on any thread.
        given: JSON values and request bodies; the time that it takes grows with their text.
    """
    return await asyncio.to_thread(work) if is_large(given) else work()


def is_large(value: object) -> bool:
    """Say whether a value holds `INLINE_CHARS` characters or items, and stop counting there."""
    left = INLINE_CHARS
    stack = [value]
    while stack and left > 0:
        item = stack.pop()
        left -= len(item) if isinstance(item, str) else 1
        if isinstance(item, BaseModel):
            stack.extend(vars(item).values())
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item[:left])
    return left <= 0

"""Work on tensors beside the engine, on a thread that takes no core from it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def offload(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function on another thread, where torch computes on that thread alone.

    Every thread that computes in parallel has workers of its own, for as long as it lives. Once
    there are more of them than cores, OpenMP lets all workers sleep between two products, the
    engine's too: 16 adapters read so at the start cost a single stream 40 % of its tokens/s.
    """
    return await asyncio.to_thread(_alone, partial(function, *args, **kwargs))


def _alone(call: Callable[[], T]) -> T:
    import torch

    torch.get_num_threads()  # a thread takes the process's number first, and keeps what is set then
    torch.set_num_threads(1)
    return call()

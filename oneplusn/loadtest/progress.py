"""Show how a load is going, in one line that renews itself on a terminal."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from oneplusn.loadtest.drive import Counts, Limits
from oneplusn.loadtest.stats import percentile

EVERY_S = 0.5
WINDOW = 10
"""Looks over which the rate of tokens is taken."""


def line(counts: Counts, tokens_per_s: float) -> str:
    """Return what is known so far; the median is of the last answers only."""
    first = counts.first_tokens
    ttft = f"{percentile(first, 50) * 1e3:.0f} ms" if first else "-"
    return (
        f"sent {counts.sent}, done {counts.done}, failed {counts.failed}, "
        f"{tokens_per_s:.0f} tok/s, TTFT p50 {ttft}"
    )


async def show(look: Callable[[], Counts], limits: Limits, *, label: str, quiet: bool) -> None:
    """Renew the line until cancelled; without a terminal there is none.

    Args:
        look: Tells how the load is going.
        limits: When it will end.
        label: Put before everything, empty for nothing.
        quiet: Show none.
    """
    seconds = None if limits.duration is None else limits.warmup + limits.duration
    total = limits.requests if seconds is None else round(seconds)
    started = time.perf_counter()
    looks = deque([(started, 0)], maxlen=WINDOW)
    form = f"{label}{{percentage:3.0f}}% {{elapsed}} {{desc}}"
    with tqdm(total=total, bar_format=form, leave=False, disable=quiet or None) as bar:
        while True:
            await asyncio.sleep(EVERY_S)
            now, counts = time.perf_counter(), look()
            before, less = looks[0]
            looks.append((now, counts.tokens))
            bar.n = counts.done + counts.failed if seconds is None else round(now - started)
            bar.n = min(bar.n, total or 0)
            bar.set_description_str(line(counts, (counts.tokens - less) / (now - before)))

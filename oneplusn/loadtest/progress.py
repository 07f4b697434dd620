"""Show how a load is going, in one line that renews itself on a terminal."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from tqdm import tqdm

from oneplusn.loadtest.drive import Driver
from oneplusn.loadtest.stats import percentile

EVERY_S = 0.5
WINDOW = 10
"""Looks over which the rate of tokens is taken."""


def line(driver: Driver, tokens_per_s: float) -> str:
    """Return what is known so far; the median is of the last answers only."""
    counts = f"sent {driver.sent}, done {driver.done}, failed {driver.failed}"
    first = driver.first_tokens
    ttft = f"{percentile(first, 50) * 1e3:.0f} ms" if first else "-"
    return f"{counts}, {tokens_per_s:.0f} tok/s, TTFT p50 {ttft}"


async def show(driver: Driver, *, quiet: bool) -> None:
    """Renew the line until cancelled; without a terminal there is none."""
    limits = driver.limits
    seconds = None if limits.duration is None else limits.warmup + limits.duration
    total = limits.requests if seconds is None else round(seconds)
    unit = "request" if seconds is None else "s"
    started = time.perf_counter()
    looks = deque([(started, 0)], maxlen=WINDOW)
    form = "{percentage:3.0f}% {elapsed} {desc}"
    with tqdm(total=total, unit=unit, bar_format=form, disable=quiet or None) as bar:
        while True:
            await asyncio.sleep(EVERY_S)
            now, tokens = time.perf_counter(), driver.tokens
            before, less = looks[0]
            looks.append((now, tokens))
            bar.n = driver.done + driver.failed if seconds is None else round(now - started)
            bar.n = min(bar.n, total or 0)
            bar.set_description_str(line(driver, (tokens - less) / (now - before)))

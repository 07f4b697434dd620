"""Do items in a process of their own, and tell what comes of each at once, a line of JSON each."""

from __future__ import annotations

import json
import subprocess
import time
import traceback
from collections.abc import Sequence
from typing import TextIO

import torch
import triton

from oneplusn.kernels.smoke.items import FULL, TINY, Item, list_items
from oneplusn.kernels.smoke.outcome import Outcome
from oneplusn.kernels.smoke.supervisor import Orders

BROKEN = 3
"""Exit status when the device does not answer any more."""
REASON = 500
"""Characters of an error that are told; all of it goes to the standard error output."""


def follow(orders: Orders, out: TextIO) -> int:
    """Do what the orders say; return the exit status."""
    device = torch.device("cpu" if orders.dry else "cuda:0")
    scale = TINY if orders.dry else FULL
    items = list_items(orders.parts, scale, device)
    _tell(out, facts=facts(device))
    return work([item for item in items if item.part in orders.listed], orders, out)


def work(items: Sequence[Item], orders: Orders, out: TextIO) -> int:
    """Do items one after the other and tell what comes of each; return the exit status."""
    for number in range(orders.first, len(items), orders.stride):
        item = items[number]
        _tell(out, begin=number, item=item[:4], form=item.form)
        started_at = time.time()
        outcome, alive = _do(item, orders)
        _tell(out, end=number, outcome=outcome, seconds=time.time() - started_at)
        if not alive:
            return BROKEN
    return 0


def _do(item: Item, orders: Orders) -> tuple[Outcome, bool]:
    """Do an item; return what comes of it, and whether the device still answers."""
    until = orders.until[item.part]
    if time.time() > until:
        return Outcome(left_out="out of time"), True
    if item.form in orders.avoid:
        return Outcome(left_out=f"{item.form!r} failed before"), True
    try:
        return item.run(until), True
    except Exception as error:
        # A kernel or a compiler raises what it likes: it belongs in this row, and the rest is done.
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:REASON]}"
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        # Errors of a kernel stay with the process.
        return Outcome(fault=reason), False
    return Outcome(fault=reason), True


def _tell(out: TextIO, **event: object) -> None:
    out.write(f"{json.dumps(event)}\n")
    out.flush()


def facts(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type != "cuda":
        return {"device": "", **versions}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(  # noqa: S603 - fixed words, nothing of a caller's
            command, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    else:
        driver = found.stdout.partition("\n")[0]
    return {"device": torch.cuda.get_device_name(device), "driver": driver, **versions}

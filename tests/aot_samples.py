"""Kernels that break a rule on purpose, and one that breaks none; prints what the gates say.

A program of its own, since kernels are interpreted in the process of the tests.
"""

from __future__ import annotations

import json
import sys

import triton
import triton.language as tl

from oneplusn.kernels.aot_forms import Form, Limit

WIDTH = tl.constexpr(128)


@triton.jit
def hand_over(h, y0, control, N, EARLY: tl.constexpr, ADD: tl.constexpr):
    """Copy H from one program to others; when EARLY, without waiting for it."""
    n = tl.arange(0, WIDTH)
    ticket = tl.atomic_add(control, 1, sem="relaxed")
    while ticket < N:
        if ticket == 0:
            tl.store(h + n, n.to(tl.bfloat16))
            tl.debug_barrier()
            tl.atomic_add(control + 2, 1, sem="release")
        else:
            y = tl.load(y0 + ticket * WIDTH + n)
            rows = tl.zeros((WIDTH,), tl.bfloat16)
            if EARLY:
                rows = tl.load(h + n)
            while tl.atomic_add(control + 2, 0, sem="acquire") < 1:
                pass
            tl.debug_barrier()
            if not EARLY:
                rows = tl.load(h + n)
            tl.store(y0 + ticket * WIDTH + n, y + rows)
        ticket = tl.atomic_add(control, 1, sem="relaxed")


@triton.jit
def hoard(x, y0, N, ROWS: tl.constexpr):
    """Hold `[ROWS, 128]` values in the registers of one warp across a loop."""
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + at).to(tl.float32)
    for step in range(N):
        values *= tl.load(y0 + step)
    tl.store(y0 + at, values)


LIMIT = Limit(255, "all there are")
SAMPLES = (
    Form("waits", hand_over, {"EARLY": False, "ADD": True}, LIMIT, "counter"),
    Form("reads early", hand_over, {"EARLY": True, "ADD": True}, LIMIT, "counter"),
    Form("fits", hoard, {"ROWS": 16}, LIMIT, num_warps=1),
    Form("spills", hoard, {"ROWS": 64}, LIMIT, num_warps=1),
    Form("greedy", hoard, {"ROWS": 16}, Limit(32, "for the test"), num_warps=1),
)


if __name__ == "__main__":
    found = {form.label: (form, form.compiled(90)) for form in SAMPLES}
    faults = {
        label: form.faults(facts) + form.order_faults(facts)
        for label, (form, facts) in found.items()
    }
    sys.stdout.write(json.dumps(faults))

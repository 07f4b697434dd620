"""The delta on CPU by a compiled kernel, straight from the pages.

Nothing is packed, so adapters that come, go or change version cost a step nothing, and the bytes
of the active experts are read once. Without a compiler `cpu` does the same in torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

import torch

from oneplusn.kernels import native
from oneplusn.kernels.plan import Plan, Site


def gated_delta(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    site: Site,
    plan: Plan,
    *,
    into: Literal["y", "delta"] = "y",
) -> None:
    """Add each row's delta to its outputs, or write it there; see `ops.gated_delta`.

    Semantics:
        As `reference.gated_delta`; the shrunken and gated rows round to the dtype of x, and the
        fp32 sum over all runs once, when it is added. A row's bits depend on the row alone.
    """
    assert x.dtype == site.a.dtype == site.b.dtype, (x.dtype, site.a.dtype)
    if into == "delta":
        for y in ys:
            y.zero_()
    if plan.empty:
        return
    count = len(ys)
    native.required().oneplusn_delta(
        ctypes.byref(site.arguments.site(site)),
        ctypes.byref(site.arguments.step(plan)),
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        x.stride(0),
        (ctypes.c_void_p * count)(*[y.data_ptr() for y in ys]),
        (ctypes.c_int64 * count)(*[y.stride(0) for y in ys]),
        native.threads(),
    )

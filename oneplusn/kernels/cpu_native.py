"""The delta on CPU by a compiled kernel: few rows straight from the pages, many run by run.

Nothing is packed, so adapters that come, go or change version cost a step nothing, and the bytes
of the active experts are read once. Without a compiler `cpu` does the same in torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

import torch

from oneplusn.kernels import native
from oneplusn.kernels.cpu import add_spans
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
        As `reference.gated_delta`; for tasks of few rows the shrunken rows stay fp32, and the sum
        over all runs rounds once, when it is added. Their bits depend on the row alone.
    """
    assert x.dtype == site.a.dtype == site.b.dtype, (x.dtype, site.a.dtype)
    if into == "delta":
        for y in ys:
            y.zero_()
    if plan.empty:
        return
    step = site.slabs.step(plan)
    if step.few:
        _add_few(ys, x, site, site.arguments.step(step))
    add_spans(ys, x, site, step.spans_of_many)


def _add_few(
    ys: Sequence[torch.Tensor], x: torch.Tensor, site: Site, step: native.StepArguments
) -> None:
    count = len(ys)
    native.required().oneplusn_delta(
        site.arguments.site(site),
        step,
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        x.stride(0),
        (ctypes.c_void_p * count)(*[y.data_ptr() for y in ys]),
        (ctypes.c_int64 * count)(*[y.stride(0) for y in ys]),
        torch.get_num_threads(),
    )

"""Pools of a few pages over two small sites, and what their slots compute."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.layout import page_image
from oneplusn.adapters.pool import Pool
from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import MemoryPlanRefused
from oneplusn.kernels.ops import gated_delta
from oneplusn.kernels.plan import SiteSpec, build_plan
from random_bundles import delta_weight, make_bundle, shapes_of
from tolerances import assert_close

QKV = SiteSpec("l.0.q+k+v", 6, (4, 2, 2), ("l.0.q", "l.0.k", "l.0.v"))
DOWN = SiteSpec("l.0.down", 5, (3,), ("l.0.down",))
SPECS = (QKV, DOWN)
SHAPES = shapes_of(SPECS)
Refs = tuple[TaskRef, ...]


def budget_of(specs: Sequence[SiteSpec], pages: int, *, max_tasks: int) -> int:
    """Bytes of a pool of this many fp32 pages at each site."""
    with pytest.raises(MemoryPlanRefused) as refused:
        Pool(specs, memory_bytes=0, dtype=torch.float32, max_tasks=max_tasks)
    found = re.findall(r"one takes (\d+) bytes, beside (\d+)", refused.value.message)
    page, tables = (int(number) for number in found[0])
    return tables + pages * page


def pool_of(pages: int, *, max_tasks: int = 16) -> Pool:
    """A pool of this many pages at each site."""
    budget = budget_of(SPECS, pages, max_tasks=max_tasks)
    return Pool(SPECS, memory_bytes=budget, dtype=torch.float32, max_tasks=max_tasks)


def lora(seed: int, pages: int = 1) -> Bundle:
    """One task "t0" with one run of this many pages at each site."""
    return make_bundle(SHAPES, seed=seed, own={"t0": 16 * pages})


def load(pool: Pool, *bundles: Bundle) -> None:
    for bundle in bundles:
        pool.load(page_image(bundle, SPECS, torch.float32))


def ref(bundle: Bundle, task: str = "t0", weight: float = 1.0) -> TaskRef:
    return TaskRef(bundle.digest, task, weight)


def loaded(pool: Pool) -> list[str]:
    return [version.digest for version in pool.resident()]


def digests(*bundles: Bundle) -> list[str]:
    return [bundle.digest for bundle in bundles]


def check_outputs(pool: Pool, bundles: Sequence[Bundle], rows: Sequence[tuple[int, Refs]]) -> None:
    """Compare a step with these (slot, what it stands for) against the weights' own products."""
    by_digest = {bundle.digest: bundle for bundle in bundles}
    plan = build_plan([slot for slot, _ in rows], pool.slots)
    for spec in SPECS:
        x = torch.randn(len(rows), spec.in_features, generator=torch.Generator().manual_seed(7))
        ys = [torch.full((len(rows), width), 0.5) for width in spec.slices]
        gated_delta(ys, x, pool.sites[spec.name], plan)
        for path, y in zip(spec.modules, ys, strict=True):
            for t, (_, refs) in enumerate(rows):
                expected = torch.full((y.shape[1],), 0.5, dtype=torch.float64)
                for task in refs:
                    weight = delta_weight(by_digest[task.digest], task.task, path)
                    if weight is not None:
                        expected += task.weight * (weight @ x[t].double())
                assert_close(y[t], expected, dtype=torch.float32)

"""Lay a bundle out as pages and gates for one base model, or say why it does not fit.

At a site, a rank row holds one A vector per slice and one B column over all slices, and a task
gates it with one number. So slices share the rows of an expert when the task gates and the scale
are the same for them; where these differ, each kind of slice has rows of its own, which are zero
in the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, ModuleDelta
from oneplusn.adapters.image import PageImage, SiteImage, page_bytes
from oneplusn.errors import AdapterIncompatible, AdapterInvalid, AdapterTooLarge
from oneplusn.kernels.plan import PAGE, SiteSpec, num_pages

# How many offenders an error names; the rest are counted.
NAMED = 5


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which linears of a base a bundle reaches.

    Attributes:
        matched: Modules of the bundle that are linears of the base.
        unmatched: Modules of the bundle that are not, and would have no effect.
        missing: Linears of the base that the bundle leaves as they are.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]


class _Factors(NamedTuple):
    """A `[r, K]` and B `[N, r]` of an expert in one slice of a site."""

    slice: int
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Strip:
    """Rank rows of one expert: the gate of each task, and the slices that share them."""

    num_rows: int
    gates: tuple[float, ...]
    slices: tuple[_Factors, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _SiteLayout:
    """The strips of every run at one site."""

    spec: SiteSpec
    runs: tuple[tuple[_Strip, ...], ...]

    @property
    def run_rows(self) -> tuple[int, ...]:
        return tuple(sum(strip.num_rows for strip in run) for run in self.runs)

    @property
    def num_pages(self) -> int:
        return sum(num_pages(rows) for rows in self.run_rows)


def coverage(bundle: Bundle, specs: Sequence[SiteSpec]) -> Coverage:
    """Compare the modules of a bundle with the linears of a base."""
    linears = [path for spec in specs for path in spec.modules]
    known = set(linears)
    return Coverage(
        matched=tuple(path for path in bundle.modules if path in known),
        unmatched=tuple(path for path in bundle.modules if path not in known),
        missing=tuple(path for path in linears if path not in bundle.modules),
    )


def page_image(
    bundle: Bundle,
    specs: Sequence[SiteSpec],
    dtype: torch.dtype,
    *,
    strict: bool = True,
    max_bytes: int | None = None,
) -> PageImage:
    """Lay `bundle` out for the base with these sites, in the pool's dtype.

    Args:
        bundle: The experts.
        specs: The base's linears.
        dtype: Of the pages.
        strict: Refuse modules that are no linears of the base, instead of leaving them out.
        max_bytes: Most bytes of all pages; None = any number.

    Raises:
        AdapterIncompatible: When a module is not a linear of the base, or has another shape.
        AdapterInvalid: When a task changes nothing.
        AdapterTooLarge: When it takes more than `max_bytes`, of which nothing was allocated.
    """
    layouts = _layouts(bundle, specs, strict=strict)
    if max_bytes is not None:
        _check_size(layouts, dtype, max_bytes)
    task_runs = _task_runs(bundle, layouts)
    sites = {
        layout.spec.name: _site_image(layout, bundle.tasks, task_runs, dtype)
        for layout in layouts
        if layout.num_pages
    }
    image = PageImage(
        digest=bundle.digest,
        tasks=bundle.tasks,
        task_keys={task: bundle.task_digest(task) for task in bundle.tasks},
        task_runs=task_runs,
        num_runs=1 + len(_own_experts(bundle)),
        sites=sites,
    )
    _refuse_zero_tasks(image, specs)
    return image


def _check_size(layouts: Iterable[_SiteLayout], dtype: torch.dtype, limit: int) -> None:
    size = sum(layout.num_pages * page_bytes(layout.spec, dtype) for layout in layouts)
    if size > limit:
        msg = (
            f"its pages take {size} bytes in memory, and {limit} is the limit; give the server more"
            " --adapter-memory, or train fewer modules or lower ranks"
        )
        raise AdapterTooLarge(msg, code="adapter_too_large")


def _layouts(bundle: Bundle, specs: Sequence[SiteSpec], *, strict: bool) -> list[_SiteLayout]:
    _check_modules(bundle, specs, strict=strict)
    runs = (bundle.runs().common, *_own_experts(bundle).values())
    layouts = []
    for spec in specs:
        deltas = [bundle.modules.get(path) for path in spec.modules]
        if any(delta is not None for delta in deltas):
            strips = _strips(deltas, len(bundle.experts))
            by_run = tuple(tuple(s for expert in run for s in strips[expert]) for run in runs)
            layouts.append(_SiteLayout(spec, by_run))
    return layouts


def _check_modules(bundle: Bundle, specs: Iterable[SiteSpec], *, strict: bool) -> None:
    shapes = {
        path: (spec.in_features, width)
        for spec in specs
        for path, width in zip(spec.modules, spec.slices, strict=True)
    }
    unknown = [path for path in bundle.modules if path not in shapes]
    if unknown and (strict or len(unknown) == len(bundle.modules)):
        msg = (
            f"{len(unknown)} of {len(bundle.modules)} modules of the adapter are no linears of "
            f"this base: {_some(unknown)}; it has {_some(list(shapes))}"
        )
        raise AdapterIncompatible(msg, code="module_unmatched")
    wrong = [
        f"{path} (adapter {delta.a.shape[1]} -> {delta.b.shape[0]}, "
        f"base {shapes[path][0]} -> {shapes[path][1]})"
        for path, delta in bundle.modules.items()
        if path in shapes and (delta.a.shape[1], delta.b.shape[0]) != shapes[path]
    ]
    if wrong:
        msg = f"{len(wrong)} modules of the adapter have another shape than the base's: "
        raise AdapterIncompatible(msg + _some(wrong))


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _own_experts(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """Experts of the own run of each task that has one; these runs come after the common one."""
    own = bundle.runs().own
    return {task: own[task] for task in bundle.tasks if own[task]}


def _task_runs(bundle: Bundle, layouts: Sequence[_SiteLayout]) -> dict[str, tuple[int, ...]]:
    """Local runs that each task gates non-zero somewhere."""
    own = {task: (run,) for run, task in enumerate(_own_experts(bundle), start=1)}
    strips = [strip for layout in layouts for strip in layout.runs[0]]
    return {
        task: ((0,) if any(strip.gates[row] for strip in strips) else ()) + own.get(task, ())
        for row, task in enumerate(bundle.tasks)
    }


def _strips(deltas: Sequence[ModuleDelta | None], num_experts: int) -> list[list[_Strip]]:
    """Per expert, group the slices in which the tasks gate it alike; ungated ones get no rows."""
    groups = [defaultdict[tuple[float, ...], list[_Factors]](list) for _ in range(num_experts)]
    for index, delta in enumerate(deltas):
        if delta is None:
            continue
        columns = delta.weights.T.tolist()
        for group, gates, span in zip(groups, columns, delta.spans, strict=True):
            if any(gates):
                group[tuple(gates)].append(_Factors(index, delta.a[span], delta.b[:, span]))
    return [
        [
            _Strip(max(factors.a.shape[0] for factors in slices), gates, tuple(slices))
            for gates, slices in group.items()
        ]
        for group in groups
    ]


def _site_image(
    layout: _SiteLayout,
    tasks: Sequence[str],
    task_runs: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> SiteImage:
    spec = layout.spec
    rows = layout.num_pages * PAGE
    a = torch.zeros(spec.num_slices, rows, spec.in_features, dtype=dtype)
    b = torch.zeros(rows, spec.out_features, dtype=dtype)
    start = 0
    for run, run_rows in zip(layout.runs, layout.run_rows, strict=True):
        row = start
        for strip in run:
            _fill(a[:, row:], b[row:].split(spec.slices, dim=-1), strip)
            row += strip.num_rows
        start += num_pages(run_rows) * PAGE
    gates = {
        task: tuple(_run_gates(layout.runs[run], row) for run in task_runs[task])
        for row, task in enumerate(tasks)
    }
    return SiteImage(
        a=a.view(spec.num_slices, -1, PAGE, spec.in_features).transpose(0, 1).contiguous(),
        b=b.view(-1, PAGE, spec.out_features),
        run_rows=layout.run_rows,
        gates=gates,
    )


def _fill(a: Tensor, b: Sequence[Tensor], strip: _Strip) -> None:
    """Write a strip to the first rows of a `[S, rows, K]` and of b `[rows, N_s]` per slice.

    This is the only rounding to the pool's dtype.
    """
    for index, a_factor, b_factor in strip.slices:
        a[index, : len(a_factor)] = a_factor
        b[index][: len(a_factor)] = b_factor.T


def _run_gates(run: Iterable[_Strip], task: int) -> Tensor:
    """Gates of a task, one per rank row of a run."""
    values = [strip.gates[task] for strip in run for _ in range(strip.num_rows)]
    return torch.tensor(values, dtype=torch.float32)


def _refuse_zero_tasks(image: PageImage, specs: Iterable[SiteSpec]) -> None:
    """Refuse tasks in which every rank row has gate, A or B of zero: they would be the base."""
    by_name = {spec.name: spec for spec in specs}
    zero = list(image.tasks)
    for name, site in image.sites.items():
        if not zero:
            return
        rows = _live_rows(site, by_name[name]).split([pages * PAGE for pages in site.run_pages])
        zero = [
            task
            for task in zero
            if not any(
                bool((rows[run][: len(gates)] & (gates != 0)).any())
                for run, gates in zip(image.task_runs[task], site.gates[task], strict=True)
            )
        ]
    if zero:
        msg = (
            f"{len(zero)} of {len(image.tasks)} tasks change nothing, their delta is zero "
            f"everywhere: {_some(zero)}; train them or leave them out"
        )
        raise AdapterInvalid(msg)


def _live_rows(site: SiteImage, spec: SiteSpec) -> Tensor:
    """Which rank rows [n*16] have a non-zero A and a non-zero B in one and the same slice."""
    a = site.a.any(dim=-1).transpose(1, 2)  # [n, 16, S]
    b = torch.stack([part.any(dim=-1) for part in site.b.split(spec.slices, dim=-1)], dim=-1)
    return (a & b).any(dim=-1).flatten()

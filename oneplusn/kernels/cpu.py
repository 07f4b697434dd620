"""The delta on CPU without a compiler: few rows as one masked product over a slab, many run by run.

In decode every row may have another task. The rank rows of all active runs are packed into one
*slab* per site, and all rows are multiplied with all of it; a gate of zero masks what a row does
not use. That is more arithmetic than needed and far fewer calls, and calls are what costs here
(docs/decisions/0002-pool-run-sitetable-plan.md has the figures). Tasks with many rows, and a
batch too large for the mask, take views of the pages instead, run by run: what a cluster shares
once for all its rows, what a task owns once for its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
import torch
from torch.nn.functional import linear

from oneplusn.kernels.cpu_step import Layout, Part, Span, Step, within
from oneplusn.kernels.plan import ABSENT, PAGE, IntArray, Plan, Site, SiteTable, num_pages

CALL_MACS = 2**24
"""Multiply-adds of a masked product that cost as much as the calls for one more run."""
MAX_WASTE = 2
"""A slab is packed anew when it has this many times the rank rows that are active."""
REORDER_AFTER = 8
"""Uses after which a slab is taken to stay, and its weights are put into oneDNN's layout."""
BUDGET = 2**30
"""Bytes of slabs, where nothing else is said."""


@dataclass(slots=True, eq=False)
class Slab:
    """The rank rows of several runs at one site, packed without padding.

    Attributes:
        layout: Where the rank rows of each run begin.
        a: `[S * R, K]`, slice by slice; reordered or not.
        b: Per slice `[R, N_s]`; reordered it stands for its transpose.
        gates: fp32 `[rows, S * R]`, for the rows of `composition`.
        composition: What `gates` were made for.
        uses: How often it was used.
        step: Number of the step that used it last.
        num_bytes: Bytes that the cache counts for it.
    """

    layout: Layout
    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    reordered: bool = False
    gates: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    composition: object = None
    uses: int = 0
    step: int = 0
    num_bytes: int = 0


class SlabCache:
    """One slab per site, within a budget shared by all sites of a pool.

    A slab is known by its site and by the content of its runs, so neither a run id that is used
    again nor a page that has moved can bring up another's weights. It serves every batch whose
    runs it holds: a task that leaves costs nothing, one that comes has the slab packed anew.

    What the current step and the one before used is never evicted: every step visits all sites
    in turn, and evicting the oldest would evict what is needed next. A slab that finds no room
    is used once and dropped.

    Attributes:
        budget: Bytes that the slabs may take.
        num_bytes: Bytes that they take.
        builds: Slabs packed so far.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.num_bytes = 0
        self.builds = 0
        self._slabs: dict[str, Slab] = {}
        self._step: Step | None = None

    def step(self, plan: Plan) -> Step:
        """Return what this backend derives from a plan; made once per plan."""
        if self._step is None or self._step.plan is not plan:
            self._step = Step(plan, self._step)
        return self._step

    def slab(self, site: Site, step: Step) -> Slab | None:
        """Return the site's slab, with the gates of the step's few rows.

        None when the masked product over it would cost more than going run by run.
        """
        name = site.spec.name
        slab = self._slabs.get(name)
        if slab is None or slab.composition is not step.composition:
            slab = self._prepare(site, step, slab)
            if slab is None:
                return None
        slab.uses += 1
        slab.step = step.number
        if slab.uses > REORDER_AFTER and not slab.reordered and _can_reorder(slab, step):
            step.reorders -= 1
            _reorder(slab)
            self._keep(name, slab)
        return slab

    def _prepare(self, site: Site, step: Step, slab: Slab | None) -> Slab | None:
        """Make the site's slab fit the step's composition: new gates, or all of it new."""
        lengths = site.table.run_rows.numpy()[step.few_runs]
        active = int(lengths.sum())
        width = site.spec.num_slices * site.spec.in_features + site.spec.out_features
        if len(step.rows) * active * width > CALL_MACS * len(step.few_runs):
            return None
        if (
            slab is None
            or slab.layout.num_rows > MAX_WASTE * active
            or not step.is_served_by(slab.layout)
        ):
            slab = _pack(site, step, lengths)
            self.builds += 1
        slab.gates = _gate_matrix(site, step, lengths, slab.layout)
        slab.composition = step.composition
        slab.step = step.number
        self._keep(site.spec.name, slab)
        return slab

    def _keep(self, name: str, slab: Slab) -> None:
        """Count a slab as it is now, and hold it if there is room for it."""
        assert self._step is not None
        self._drop(name)
        slab.num_bytes = _num_bytes(slab)
        if self.num_bytes + slab.num_bytes > self.budget:
            for other in [n for n, s in self._slabs.items() if s.step < self._step.number - 1]:
                self._drop(other)
        if self.num_bytes + slab.num_bytes <= self.budget:
            self._slabs[name] = slab
            self.num_bytes += slab.num_bytes

    def _drop(self, name: str) -> None:
        if name in self._slabs:
            self.num_bytes -= self._slabs.pop(name).num_bytes


def _pack(site: Site, step: Step, lengths: IntArray) -> Slab:
    """Copy the true rank rows of the active runs from their pages."""
    spec = site.spec
    first = site.table.run_first.numpy()[step.few_runs]
    rows = within(lengths)
    pages, lanes = np.repeat(first, lengths) + rows // PAGE, rows % PAGE
    slices = np.arange(spec.num_slices)[:, None]
    a_rows = torch.from_numpy(((pages * spec.num_slices + slices) * PAGE + lanes).ravel())
    b_rows = torch.from_numpy(pages * PAGE + lanes)
    return Slab(
        layout=step.layout(lengths),
        a=site.a.view(-1, spec.in_features).index_select(0, a_rows),
        b=site.b.view(-1, spec.out_features).index_select(0, b_rows).split(spec.slices, dim=1),
    )


def _gate_matrix(site: Site, step: Step, lengths: IntArray, layout: Layout) -> torch.Tensor:
    """Spread the gates of the few rows over a slab's rank rows, for each slice; zero elsewhere."""
    offsets = site.table.gate_first.numpy()[step.pairs.slots, step.pairs.ks]
    source, target = step.gate_map(layout, lengths, offsets)
    num_rows, num_slices = len(step.rows), site.spec.num_slices
    gates = np.zeros(num_rows * layout.num_rows, dtype=np.float32)
    gates[target] = site.table.gates.numpy()[source]
    sliced = torch.from_numpy(gates).view(num_rows, 1, -1).expand(-1, num_slices, -1)
    return sliced.reshape(num_rows, -1)


def _can_reorder(slab: Slab, step: Step) -> bool:
    return (
        step.reorders > 0
        and slab.layout.num_rows > 0
        and slab.a.dtype == torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _reorder(slab: Slab) -> None:
    """Put a slab's weights into the layout that oneDNN reads fastest; results stay the same."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    slab.a = reorder(slab.a, PAGE)
    slab.b = tuple(reorder(b.t().contiguous(), PAGE) for b in slab.b)
    slab.reordered = True


def _num_bytes(slab: Slab) -> int:
    weights = (slab.a, *slab.b)
    if slab.reordered:
        return slab.gates.nbytes + sum(int(torch.ops.mkldnn._nbytes(w)) for w in weights)
    return slab.gates.nbytes + sum(w.nbytes for w in weights)


def _reordered_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x `[T, K]` with a reordered weight `[N, K]`."""
    product = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return cast(torch.Tensor, product)


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
        As `reference.gated_delta`, computed in the dtype of the pages: the shrunken rows round to
        it before the gate and after, and the delta when it is added.
    """
    assert x.dtype == site.a.dtype == site.b.dtype, (x.dtype, site.a.dtype)
    if into == "delta":
        for y in ys:
            y.zero_()
    if plan.empty:
        return
    step = site.slabs.step(plan)
    spans: Iterable[Span] = step.spans_of_many
    if step.few:
        slab = site.slabs.slab(site, step)
        if slab is None:
            spans = step.spans_of_all
        elif slab.layout.num_rows:
            _add_masked(ys, x, slab, step)
    add_spans(ys, x, site, spans)


def add_spans(
    ys: Sequence[torch.Tensor], x: torch.Tensor, site: Site, spans: Iterable[Span]
) -> None:
    """Add the delta of whole runs to the rows of their spans, run by run, from the pages."""
    for span in spans:
        _add_run(ys, x, site, span)


def _add_masked(ys: Sequence[torch.Tensor], x: torch.Tensor, slab: Slab, step: Step) -> None:
    """Multiply the few rows with the whole slab, and mask what each does not use."""
    rows = x if step.index is None else x.index_select(0, step.index)
    shrink = _reordered_linear if slab.reordered else linear
    expand = _reordered_linear if slab.reordered else torch.mm
    h = shrink(rows, slab.a).mul_(slab.gates)
    for y, gated, b in zip(ys, h.view(len(h), len(ys), -1).unbind(1), slab.b, strict=True):
        if step.index is None:
            y.add_(expand(gated, b))
        else:
            y.index_add_(0, step.index, expand(gated, b))


def _add_run(ys: Sequence[torch.Tensor], x: torch.Tensor, site: Site, span: Span) -> None:
    """Apply one run to the rows of its span, from its pages."""
    table = site.table
    first, num_rows = int(table.run_first[span.run]), int(table.run_rows[span.run])
    if not num_rows:
        return
    gates = _span_gates(table, span, num_rows)
    b = site.b.view(-1, site.spec.out_features)[first * PAGE : first * PAGE + num_rows]
    hs = _shrink_run(x[span.rows], site.a[first : first + num_pages(num_rows)], num_rows)
    for y, h, b_slice in zip(ys, hs, b.split_with_sizes(site.spec.slices, 1), strict=True):
        h.mul_(gates)
        if isinstance(span.rows, slice):
            y[span.rows].addmm_(h, b_slice)
        else:
            y.index_add_(0, span.rows, torch.mm(h, b_slice))


def _shrink_run(rows: torch.Tensor, a: torch.Tensor, num_rows: int) -> Sequence[torch.Tensor]:
    """Multiply rows `[T, K]` with pages `[n, S, 16, K]`; per slice the true rank rows `[T, R]`."""
    pages, slices, _, width = a.shape
    if slices == 1:
        return [linear(rows, a.view(-1, width)[:num_rows])]
    h = linear(rows, a.view(-1, width)).view(-1, pages, slices, PAGE)
    return h.transpose(1, 2).reshape(-1, slices, pages * PAGE)[:, :, :num_rows].unbind(1)


def _span_gates(table: SiteTable, span: Span, num_rows: int) -> torch.Tensor:
    """Return the run's gates for the rows of a span: `[R]` for one slot, else `[rows, R]`."""
    gates = [_part_gates(table, part, num_rows) for part in span.parts]
    if len(gates) == 1:
        return gates[0]
    counts = torch.tensor([part.num_rows for part in span.parts])
    return torch.stack(gates).repeat_interleave(counts, dim=0)


def _part_gates(table: SiteTable, part: Part, num_rows: int) -> torch.Tensor:
    if part.k == ABSENT:
        return torch.zeros(num_rows)
    offset = int(table.gate_first[part.slot, part.k])
    return table.gates[offset : offset + num_rows]

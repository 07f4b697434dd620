"""What a plan means on CPU: which rows share a masked product, and which go run by run.

All of it depends on the plan and on how long runs are, not on what they hold. Sites mostly agree on
that, so what is worked out for the first serves the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from oneplusn.kernels.plan import ABSENT, IntArray, Plan, RunKey, Segment

TASK_ROWS = 64
"""Rows from which a task takes its experts from their pages, run by run."""
REORDERS_PER_STEP = 8
"""Slabs reordered in one step at most, so that no step takes much longer than the others."""


class Part(NamedTuple):
    """Consecutive rows of one slot within a span, and its k for the span's run, or ABSENT."""

    slot: int
    k: int
    num_rows: int


class Span(NamedTuple):
    """A run, and rows of the batch that it is applied to."""

    run: int
    rows: slice | torch.Tensor
    parts: tuple[Part, ...]


class Pairs(NamedTuple):
    """Every (row, run) of the few rows that belong together, as parallel arrays."""

    rows: NDArray[np.intp]
    runs: NDArray[np.intp]
    slots: NDArray[np.intp]
    ks: NDArray[np.intp]


class GateMap(NamedTuple):
    """For every gate of the few rows its place in a table, and in a flat `[rows, R]`."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the rank rows of each run begin in a slab, and how many there are."""

    columns: Mapping[RunKey, int]
    num_rows: int


class Step:
    """What a plan means for this backend; the same for all sites, each part made when needed.

    Attributes:
        number: Counts the plans that came before.
        few: Segments short enough to share a masked product.
        many: The others.
        few_runs: Ids of the runs of `few`, in the order of `few_keys`.
        few_keys: Their content identities.
        rows: Rows of `few` in the batch's order.
        index: The same as a tensor; None when these are all rows of the batch.
        composition: Identity of what `rows` ask for; compared by `is`.
        reorders: Slabs that may still be reordered in this step.
    """

    def __init__(self, plan: Plan, before: Step | None) -> None:
        self.plan = plan
        self.number: int = before.number + 1 if before else 0
        self.few = [s for s in plan.segments if s.stop - s.start < TASK_ROWS]
        self.many = [s for s in plan.segments if s.stop - s.start >= TASK_ROWS]
        used = {use.run for segment in self.few for use in plan.uses(segment.start)}
        few_runs = [run for run in plan.run_keys if run in used]
        self.few_runs = np.array(few_runs, dtype=np.intp)
        self.few_keys = [plan.run_keys[run] for run in few_runs]
        self.rows = np.sort(_concatenate([plan.rows[s.start : s.stop] for s in self.few]))
        everything = len(self.rows) == plan.num_rows
        self.index = None if everything else torch.from_numpy(self.rows)
        composition = (plan.key, self.rows.tobytes())
        same = before is not None and before.composition == composition
        self.composition: object = before.composition if before and same else composition
        self.reorders = REORDERS_PER_STEP
        self._layouts: dict[bytes, Layout] = {}
        self._gate_maps: dict[tuple[Layout, bytes, bytes], GateMap] = {}
        self._served: dict[Layout, bool] = {}

    @cached_property
    def pairs(self) -> Pairs:
        """The (row, run) pairs of `few`; rows count within `rows`, runs within `few_runs`."""
        place = {run: index for index, run in enumerate(self.few_runs.tolist())}
        pairs = []
        for segment in self.few:
            rows = np.searchsorted(self.rows, self.plan.rows[segment.start : segment.stop])
            for run, k in self.plan.uses(segment.start):
                pairs += [(row, place[run], segment.slot, k) for row in rows.tolist()]
        return Pairs(*np.array(pairs, dtype=np.intp).reshape(-1, 4).T)

    def layout(self, lengths: IntArray) -> Layout:
        """Return the layout of a slab with exactly `few_runs`, of these rank rows each."""
        key = lengths.tobytes()
        if key not in self._layouts:
            starts = (np.cumsum(lengths) - lengths).tolist()
            columns = dict(zip(self.few_keys, starts, strict=True))
            self._layouts[key] = Layout(columns, int(lengths.sum()))
        return self._layouts[key]

    def is_served_by(self, layout: Layout) -> bool:
        """Tell whether a slab of this layout holds every run of `few`."""
        if layout not in self._served:
            self._served[layout] = all(key in layout.columns for key in self.few_keys)
        return self._served[layout]

    def gate_map(self, layout: Layout, lengths: IntArray, offsets: IntArray) -> GateMap:
        """Map gates to a slab: given rank rows per run, and per pair where its gates begin."""
        key = (layout, lengths.tobytes(), offsets.tobytes())
        if key not in self._gate_maps:
            columns = np.array([layout.columns[key] for key in self.few_keys], dtype=np.int64)
            starts = self.pairs.rows * layout.num_rows + columns[self.pairs.runs]
            counts = lengths[self.pairs.runs]
            steps = within(counts)
            source, target = (np.repeat(first, counts) + steps for first in (offsets, starts))
            self._gate_maps[key] = GateMap(source, target)
        return self._gate_maps[key]

    @cached_property
    def spans_of_many(self) -> list[Span]:
        """Every run of the segments in `many`, and the rows that it is applied to."""
        return _spans(self.plan, self.many)

    @cached_property
    def spans_of_all(self) -> list[Span]:
        """Every run, and the rows that it is applied to."""
        return _spans(self.plan, self.plan.segments)


def _spans(plan: Plan, among: Sequence[Segment]) -> list[Span]:
    """List the runs of some segments, each with its cluster's rows from first use to last.

    What lies between and does not use the run, or is not among the segments, is an absent part.
    """
    wanted = set(among)
    spans = []
    for start, stop in plan.clusters:
        segments = [s for s in plan.segments if start <= s.start < stop]
        uses = [dict(plan.uses(s.start)) if s in wanted else {} for s in segments]
        for run in dict.fromkeys(run for used in uses for run in used):
            having = [index for index, used in enumerate(uses) if run in used]
            extent = slice(having[0], having[-1] + 1)
            parts = tuple(
                Part(s.slot, used.get(run, ABSENT), s.stop - s.start)
                for s, used in zip(segments[extent], uses[extent], strict=True)
            )
            rows = plan.rows[segments[having[0]].start : segments[having[-1]].stop]
            spans.append(Span(run, _batch_rows(rows), parts))
    return spans


def _batch_rows(rows: IntArray) -> slice | torch.Tensor:
    """Return a slice where the rows are neighbours in the batch, so that views will do."""
    if np.all(np.diff(rows) == 1):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _concatenate(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def within(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return 0 .. count - 1 for each count, one after another."""
    starts = np.cumsum(counts, dtype=np.int64) - counts
    steps: NDArray[np.int64] = np.arange(counts.sum(), dtype=np.int64) - np.repeat(starts, counts)
    return steps

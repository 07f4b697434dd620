"""The specification: the formula as loops, row by row and rank row by rank row, in fp64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from oneplusn.kernels.plan import ABSENT, PAGE, Plan, Site


class RankRow(NamedTuple):
    """One rank row that one row of the batch uses: where it lies, and how much it counts."""

    page: int
    lane: int
    gate: float


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
        For every adapted row t and slice s, over the rank rows e of the runs that t uses:
        delta[s][t] = sum over e of gate[t, e] * (a[e, s] . x[t]) * b[e, columns of s],
        summed in fp64 and rounded once. No other rank row of a page is read.
    """
    if into == "delta":
        for y in ys:
            y.zero_()
    bounds = site.spec.bounds
    for tile in range(len(plan.tile_rows) - 1):
        for position in range(int(plan.tile_rows[tile]), int(plan.tile_rows[tile + 1])):
            row = int(plan.rows[position])
            delta = torch.zeros(bounds[-1], dtype=torch.float64, device=x.device)
            for page, lane, gate in _rank_rows(site, plan, tile, position):
                for s in range(len(ys)):
                    columns = slice(bounds[s], bounds[s + 1])
                    h = gate * (site.a[page, s, lane].double() @ x[row].double())
                    delta[columns] += h * site.b[page, lane, columns].double()
            for s, y in enumerate(ys):
                y[row] = (y[row].double() + delta[bounds[s] : bounds[s + 1]]).to(y.dtype)


def _rank_rows(site: Site, plan: Plan, tile: int, position: int) -> Iterator[RankRow]:
    """Walk the runs of a tile and yield the rank rows that its row at `position` uses."""
    table = site.table
    slot = int(plan.slots[position])
    first_run, last_run = int(plan.tile_runs[tile]), int(plan.tile_runs[tile + 1])
    first_k = int(plan.tile_ks[tile])
    first_k += (position - int(plan.tile_rows[tile])) * (last_run - first_run)
    for entry in range(first_run, last_run):
        run = int(plan.runs[entry])
        k = int(plan.ks[first_k + entry - first_run])
        if k == ABSENT:
            continue
        first_page = int(table.run_first[run])
        first_gate = int(table.gate_first[slot, k])
        for r in range(int(table.run_rows[run])):
            yield RankRow(first_page + r // PAGE, r % PAGE, float(table.gates[first_gate + r]))

"""Count what a method would train, and fit its ranks to a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from oneplusn.adapters.methods.base import Method
from oneplusn.adapters.validation import MAX_RANK
from oneplusn.errors import InvalidRequest
from oneplusn.kernels.plan import SiteSpec


class Budget(NamedTuple):
    """Trained parameters.

    Attributes:
        experts: of the factors A and B.
        gates: of what makes the gate rows, shared embeddings included.
    """

    experts: int
    gates: int

    @property
    def total(self) -> int:
        """Both."""
        return self.experts + self.gates


def budget(method: Method, sites: Sequence[SiteSpec]) -> Budget:
    """Count what a method trains at these sites; nothing is allocated."""
    rank_rows = sum(expert.rank for expert in method.experts())
    widths = sum(site.in_features * site.num_slices + site.out_features for site in sites)
    with torch.device("meta"):
        shared = method.shared()
        gate = method.gate(shared)
    num_gates = len(sites) if method.gate_scope == "site" else 1
    of_shared = 0 if shared is None else sum(p.numel() for p in shared.parameters())
    of_gate = sum(p.numel() for p in gate.parameters())
    return Budget(rank_rows * widths, of_shared + num_gates * of_gate)


def match(
    method: Method, sites: Sequence[SiteSpec], total: int, *, tolerance: float = 0.05
) -> Method:
    """Return the method with the rank whose parameters come closest to a total.

    Only ranks change: `rank`, and an `own_rank` that is set keeps its ratio to it, rounded, at
    least 1. Counts of experts stay, since they are what is compared.

    Args:
        method: whatever its rank.
        sites: where it is trained.
        total: parameters to come to.
        tolerance: largest relative distance from the total.

    Raises:
        InvalidRequest: no rank comes within the tolerance.
    """

    def parameters(rank: int) -> int:
        return budget(_with_rank(method, rank), sites).total

    ranks = range(1, MAX_RANK + 1)
    above = bisect_left(ranks, total, key=parameters)
    near = [ranks[i] for i in (above - 1, above) if 0 <= i < len(ranks)]
    best = min(near, key=lambda rank: abs(parameters(rank) - total))
    if abs(parameters(best) - total) > tolerance * total:
        steps = "; ".join(f"rank {rank} has {parameters(rank):,}" for rank in near)
        raise InvalidRequest(
            f"{method.name} cannot have {total:,} parameters within {tolerance:.0%}: {steps};"
            " change the number of experts, the total, or the tolerance",
            param="match_params",
        )
    return _with_rank(method, best)


def _with_rank(method: Method, rank: int) -> Method:
    changes: dict[str, Any] = {"rank": rank}
    own_rank = getattr(method, "own_rank", None)
    if own_rank is not None:
        changes["own_rank"] = max(1, round(own_rank * rank / method.rank))
    return replace(method, **changes)

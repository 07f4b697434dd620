"""How much an adapter changes: the Frobenius norm of what it adds, without ever forming it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, ModuleDelta
from oneplusn.kernels.plan import SiteSpec

MAX_PRODUCTS = 2e10
"""Multiplications that the norms of a whole adapter may take: seconds on one core."""


def delta_norms(bundle: Bundle, specs: Sequence[SiteSpec]) -> Mapping[str, float] | None:
    """Return the norm of what is added at every site, by the task for which it is largest.

    Semantics:
        norm[site] = max over tasks j of || [sum over e of G[j, e] * B_e A_e] for every slice ||_F

    None if that would take too long.
    """
    if _num_products(bundle) > MAX_PRODUCTS:
        return None
    norms = {}
    for spec in specs:
        deltas = [bundle.modules[path] for path in spec.modules if path in bundle.modules]
        if deltas:
            squares = sum(_squares(delta) for delta in deltas)
            assert isinstance(squares, Tensor)
            norms[spec.name] = math.sqrt(max(squares.max().item(), 0.0))
    return norms


def _squares(delta: ModuleDelta) -> Tensor:
    """Return the squared norm of a module's delta for every task, fp64 `[J]`.

    Semantics:
        || B diag(w) A ||_F^2 = w^T ((A A^T) * (B^T B)) w, w the gates of the rank rows
    """
    per_row = delta.weights.double().repeat_interleave(torch.tensor(delta.ranks), dim=1)
    squares = torch.zeros(len(per_row), dtype=torch.float64)
    for task, gates in enumerate(per_row):
        a, b = delta.a, delta.b
        if not gates.all():
            rows = gates.nonzero().flatten()
            a, b, gates = a[rows], b[:, rows], gates[rows]
        grams = (a.float() @ a.T.float()) * (b.T.float() @ b.float())
        squares[task] = gates @ grams.double() @ gates
    return squares


def _num_products(bundle: Bundle) -> float:
    """Bound the multiplications of `_squares` over all modules."""
    ranks = torch.tensor([delta.ranks for delta in bundle.modules.values()], dtype=torch.float64)
    widths = [delta.a.shape[1] + delta.b.shape[0] for delta in bundle.modules.values()]
    rows = bundle.gated.double() @ ranks.T
    return (rows.square() @ torch.tensor(widths, dtype=torch.float64)).sum().item()

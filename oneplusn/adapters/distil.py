"""Turn a blend of tasks into one plain LoRA: exactly, or cut to a rank with a known error.

The experts of a blend, side by side with their gates folded in, are one LoRA whose rank is the sum
of theirs. The best LoRA of a smaller rank is the head of the singular value decomposition of what
that one adds to the weight; neither is ever formed at the size of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.checks import check_name
from oneplusn.adapters.edits import blended_gates
from oneplusn.errors import InvalidRequest


class LowRank(NamedTuple):
    """A product B A: B [N, r], A [r, K]."""

    b: Tensor
    a: Tensor

    def norm(self) -> float:
        """Frobenius norm of the product, without forming it."""
        left, right = torch.linalg.qr(self.b.double()).R, torch.linalg.qr(self.a.double().T).R
        return float(torch.linalg.matrix_norm(left @ right.T))

    def cut(self, rank: int) -> LowRank:
        """Return the nearest product of a rank, fp64; both factors carry the root of the values.

        Semantics:
            argmin over B' [N, rank], A' [rank, K] of || B A - B' A' ||_F  (Eckart, Young 1936)
        """
        left, left_core = torch.linalg.qr(self.b.double())
        right, right_core = torch.linalg.qr(self.a.double().T)
        u, values, vt = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        roots = values[:rank].sqrt()
        return LowRank(left @ (u[:, :rank] * roots), (right @ (vt[:rank].T * roots)).T)

    def minus(self, other: LowRank) -> LowRank:
        """Return the difference, its rank the sum of both."""
        b = torch.cat([self.b.double(), -other.b.double()], dim=1)
        return LowRank(b, torch.cat([self.a.double(), other.a.double()]))


class Distilled(NamedTuple):
    """One LoRA in place of a blend.

    Attributes:
        bundle: one task with one own expert, gate and scale 1.
        errors: module path -> || blend - LoRA ||_F / || blend ||_F, of the factors as they are
            stored, so rounding to their dtype counts; 0 where the blend adds nothing.
    """

    bundle: Bundle
    errors: Mapping[str, float]


def distil(
    bundle: Bundle,
    weights: Mapping[str, float],
    *,
    task: str,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Distilled:
    """Turn a blend of a bundle's tasks into a bundle of one plain LoRA.

    Args:
        bundle: the experts.
        weights: task -> its weight.
        task: name of the task that comes out.
        rank: largest rank at any module, cut by singular values where the blend has more; None
            keeps all, which is exact but for one rounding of gate times A.
        dtype: of the factors.

    Raises:
        AdapterNotFound: the bundle has no such task.
        AdapterInvalid: the name cannot be one.
        InvalidRequest: the blend is empty, adds nothing, or the rank is below 1.
    """
    check_name(task, "task name")
    if rank is not None and rank < 1:
        raise InvalidRequest(f"rank {rank}: give at least 1, or none to keep every rank")
    blend = blend_factors(bundle, weights)
    stored = {
        path: LowRank(*(factor.to(dtype) for factor in _cut(whole, rank)))
        for path, whole in blend.items()
    }
    return Distilled(one_lora(bundle, task, stored), relative_errors(blend, stored))


def blend_factors(bundle: Bundle, weights: Mapping[str, float]) -> dict[str, LowRank]:
    """Put a blend's experts side by side, with gate times scale folded into A, fp64.

    Modules at which the blend gates nothing are left out.

    Raises:
        AdapterNotFound: the bundle has no such task.
        InvalidRequest: the blend is empty or adds nothing.
    """
    factors = {}
    for path, gates in blended_gates(bundle, weights).items():
        delta = bundle.modules[path]
        folded = (gates.double() * delta.scale.double()).tolist()
        terms = [
            (delta.b[:, span].double(), weight * delta.a[span].double())
            for weight, span, rank in zip(folded, delta.spans, delta.ranks, strict=True)
            if weight and rank
        ]
        if terms:
            b, a = zip(*terms, strict=True)
            factors[path] = LowRank(torch.cat(b, dim=1), torch.cat(a))
    if not any(whole.norm() for whole in factors.values()):
        raise InvalidRequest(
            "the blend adds nothing at any module: its tasks cancel each other or are untrained;"
            " give other weights"
        )
    return factors


def relative_errors(
    blend: Mapping[str, LowRank], stored: Mapping[str, LowRank]
) -> dict[str, float]:
    """Return how far factors are from those of a blend; see `Distilled.errors`."""
    norms = {path: whole.norm() for path, whole in blend.items()}
    return {
        path: whole.minus(stored[path]).norm() / norms[path] if norms[path] else 0.0
        for path, whole in blend.items()
    }


def _cut(whole: LowRank, rank: int | None) -> LowRank:
    return whole if rank is None or len(whole.a) <= rank else whole.cut(rank)


def one_lora(bundle: Bundle, task: str, factors: Mapping[str, LowRank]) -> Bundle:
    """Make a bundle of one plain LoRA for the base of another bundle."""
    rank = max(len(pair.a) for pair in factors.values())
    return Bundle(
        method="lora",
        tasks=(task,),
        experts=(Expert(task, "own", task, rank),),
        modules={
            path: ModuleDelta(
                a=pair.a,
                b=pair.b,
                ranks=(len(pair.a),),
                gate=torch.ones(1, 1),
                scale=torch.ones(1),
            )
            for path, pair in factors.items()
        },
        base=bundle.base,
        metadata={key: text for key, text in bundle.metadata.items() if key == "base_model"},
    )

"""Compare the gradients that tasks give the factors of one shared LoRA.

Of a factor, a task's gradient is a matrix G of r rank rows. Two tasks are alike at it as far as
their rows span the same directions, which is a cosine of matrices (the RV coefficient):

    overlap(i, j) = <G_i' G_i, G_j' G_j> / (||G_i' G_i|| ||G_j' G_j||)

It lies in 0..1. Of a linear, the larger of the overlaps at A and at B counts: an expert is shared
with profit where tasks read the same features, or where they write the same directions. The sign
is not seen: tasks that want opposite answers of the same features are alike, since gates and own
experts are there to tell such tasks apart.

A gradient of a few batches is mostly noise, so

* every element is divided by its deviation between batches of one task,
* a task's norm is that between the two halves of its batches, whose noises are independent,
* how well the halves agree about what is special to each task says what a point is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-2
"""Smallest deviation that an element is divided by, as a share of the mean deviation."""

LEAST_SIGNAL = 0.5
"""Smallest share of a gradient's norm that is taken for signal, which bounds the correction."""


class Linear(NamedTuple):
    """Where the gradients of one linear's factors lie in the flat one of P elements.

    Attributes:
        start: of A, which B follows.
        in_features: K.
        out_features: N.
        rank: R.
    """

    start: int
    in_features: int
    out_features: int
    rank: int

    @property
    def middle(self) -> int:
        """The end of A and the start of B."""
        return self.start + self.rank * self.in_features

    @property
    def stop(self) -> int:
        """The end of B."""
        return self.middle + self.out_features * self.rank


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of J tasks at one point of a run.

    Attributes:
        halves: mean over each half of a task's batches, [J, 2, P] fp32.
        variance: of one batch's gradient within a task, mean over the tasks, [P] fp32.
    """

    halves: Tensor
    variance: Tensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """How alike tasks are at one point.

    Attributes:
        overlap: mean over the linears of what the module describes, [J, J] fp64 in 0..1.
        direction: cosine of the whole gradients, [J, J] fp64 in -1..1; below 0 the tasks want
            the shared weights changed in opposite ways.
        reliability: correlation between the two halves of what is special to each task; about 0
            where the tasks cannot be told apart, 1 where nothing is noise.
        significance: by how many standard deviations of chance it is above 0; infinite where
            nothing is noise.
    """

    overlap: Tensor
    direction: Tensor
    reliability: float
    significance: float


def compare(gradients: Gradients, linears: Sequence[Linear]) -> Comparison:
    """Compare every pair of tasks.

    Args:
        gradients: at one point.
        linears: all that the shared LoRA is at. An A whose gradient is zero, as it is as long as
            its B is, is left out.
    """
    num_tasks = len(gradients.halves)
    deviation = gradients.variance.double().sqrt()
    scale = 1 / (deviation + FLOOR * deviation.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    inner = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    within = torch.zeros(num_tasks, dtype=torch.float64)
    special = torch.zeros(2, 2, dtype=torch.float64)
    noise = torch.zeros_like(inner)
    overlaps = []
    for linear in linears:
        span = slice(linear.start, linear.stop)
        halves = gradients.halves[..., span].double() * scale[span]
        mean = halves.mean(1)
        inner += mean @ mean.T
        within += (halves[:, 0] * halves[:, 1]).sum(1)
        centred = (halves - halves.mean(0)).transpose(0, 1).flatten(1)
        special += centred @ centred.T
        difference = halves[:, 0] - halves[:, 1]
        noise += difference @ difference.T
        overlaps += _overlaps(halves, linear)
    assert overlaps, "the gradient of every B is zero"
    norms = torch.maximum(within, inner.diagonal() * LEAST_SIGNAL).sqrt()
    return Comparison(
        overlap=torch.stack(overlaps).mean(0),
        direction=_unit_diagonal(inner / (norms[:, None] * norms)).clamp(-1, 1),
        reliability=float(special[0, 1] / (special[0, 0] * special[1, 1]).sqrt()),
        significance=float(special[0, 1] / _chance(noise)),
    )


def _chance(noise: Tensor) -> Tensor:
    """Return the standard deviation that the agreement of the halves has if tasks are all alike.

    Semantics:
        Let S be the covariance of the noise of one half's mean. The sum over tasks of the product
        of both halves, the mean over the tasks taken off, then has the variance (J - 1) tr(S S).
        The difference of a task's halves is free of signal and has the covariance 2 S, so its
        product with another task's has the mean square 4 tr(S S).

    Args:
        noise: products of these differences, [J, J].
    """
    num_tasks = len(noise)
    squares = noise.square().sum() - noise.diagonal().square().sum()
    return (squares / (4 * num_tasks)).sqrt()


def _overlaps(halves: Tensor, linear: Linear) -> list[Tensor]:
    """Return the overlap [J, J] at one linear, in a list that is empty if there is no gradient."""
    size = linear.middle - linear.start
    a = halves[..., :size].unflatten(-1, (linear.rank, linear.in_features))
    b = halves[..., size:].unflatten(-1, (linear.out_features, linear.rank)).transpose(-1, -2)
    found = [_overlap(rows) for rows in (a, b) if rows.flatten(1).any(1).all()]
    return [torch.stack(found).amax(0)] if found else []


def _overlap(rows: Tensor) -> Tensor:
    """Return the overlaps [J, J] of gradients [J, 2, R, D]."""
    num_tasks, _, rank, _ = rows.shape
    mean = rows.mean(1).flatten(0, 1)
    products = (mean @ mean.T).square().view(num_tasks, rank, num_tasks, rank)
    cross = products.sum((1, 3))
    between = (rows[:, 0] @ rows[:, 1].transpose(-1, -2)).square().sum((1, 2))
    norms = torch.maximum(between, cross.diagonal() * LEAST_SIGNAL**2).sqrt()
    return _unit_diagonal(cross / (norms[:, None] * norms)).clamp(max=1)


def _unit_diagonal(matrix: Tensor) -> Tensor:
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), 1.0)

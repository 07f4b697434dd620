"""The allocation that Poly, MHR and C-Poly have in common: sigmoids, normalised over each row.

    w[t, s] = sigmoid(z[t, s]) / sum over s' of sigmoid(z[t, s'])

While training, the sigmoid may be that of a relaxed Bernoulli draw (Gumbel-sigmoid):
sigmoid((z + log u - log(1 - u)) / temperature) with u uniform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oneplusn.adapters.methods.base import Method
from oneplusn.adapters.methods.settings import flag, number, setting
from oneplusn.errors import InvalidRequest

EPSILON = 1e-12
START = 1e-3
"""Logits start uniform within this of zero, so that rows start near uniform."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How weights are drawn in training.

    Attributes:
        noise: whether they are; the mean of the draw, sigmoid(z), otherwise and in evaluation.
        temperature: of the relaxed Bernoulli draw.
        straight_through: round the draw to 0 or 1, and let gradients pass as if it were not.
    """

    noise: bool
    temperature: float
    straight_through: bool

    def weights(self, logits: Tensor, *, training: bool) -> Tensor:
        """Return weights of the shape of the logits; each row sums to 1."""
        if not (self.noise and training):
            return _normalised(torch.sigmoid(logits))
        # fp32 rounds what is nearer to 1 up to it, and the logit of 1 is infinite.
        uniform = torch.rand_like(logits).clamp(EPSILON, 1 - 1e-7)
        drawn = torch.sigmoid((logits + torch.logit(uniform)) / self.temperature)
        if not self.straight_through:
            return _normalised(drawn)
        rounded = drawn + (drawn.round() - drawn).detach()
        # A row may have drawn nothing; its weights are then zero, with a gradient.
        return rounded / rounded.sum(dim=-1, keepdim=True).clamp_min(1.0)


def logits_of(weights: Tensor) -> Tensor:
    """Return logits whose sigmoids, normalised over rows, are these weights.

    Only the ratios are fixed; the sum of the sigmoids is chosen as large as at the start, half
    their number, unless one would reach 1.
    """
    largest = weights.amax(dim=-1, keepdim=True)
    total = (0.95 / largest).clamp_max(weights.shape[-1] / 2)
    return torch.logit((weights * total).clamp(1e-6, 1 - 1e-6))


def _normalised(values: Tensor) -> Tensor:
    return values / (values.sum(dim=-1, keepdim=True) + EPSILON)


@dataclass(frozen=True)
class Allocating(Method):
    """A method whose common weights are normalised sigmoids."""

    noise: bool = setting(False, "draw the allocation in training (Gumbel-sigmoid)", flag())
    temperature: float = setting(1.0, "of the draw", number(0, 100))
    straight_through: bool = setting(
        False, "round the draw to 0 or 1, gradients as if it were not; needs noise", flag()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.straight_through and not self.noise:
            raise InvalidRequest(
                f"{self.name}: straight_through is true and noise is false; without a draw there"
                " is nothing to round, so set noise: true as well",
                param="straight_through",
            )

    @property
    def draw(self) -> Draw:
        """How weights are drawn in training."""
        return Draw(self.noise, self.temperature, self.straight_through)

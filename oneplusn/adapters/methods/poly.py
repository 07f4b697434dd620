"""Poly (arXiv 2202.13914, Eq. 1-3) and MHR (arXiv 2211.03831, section 3): mixed factors.

    w = sigmoid(z[t]), normalised over the S skills
    y = W x + s * (sum over skills of w_i B_i) (sum over skills of w_i A_i) x

MHR cuts the inputs and the outputs into q blocks, each with weights of its own; Poly is q = 1.
The scale is 1 / r, as in all published code.

A task always ends as one LoRA of rank r, whatever the number of skills. At equal parameters this
starves against the output mix, so ranks have to be higher here; it is also what is exported, one
LoRA a task: exact, but with T tasks on S skills the file is T / S times the training's.

Deviations:

* The noise of the draw is off unless asked for: gates sampled in training differ from the mean
  that is served for good. The authors' later code has the switch too, and uses both.
* Linears that read the same x share their weights, because they are one site when served; the
  code has weights for each linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods.base import Delta, FactorDelta, Gate, one_per_task
from oneplusn.adapters.methods.settings import setting, whole
from oneplusn.adapters.methods.sigmoid import START, Allocating, Draw, logits_of
from oneplusn.adapters.validation import MAX_EXPERTS


class PolyGate(Gate):
    """The allocation of one site: W [J, q, S]."""

    def __init__(self, shape: tuple[int, int, int], draw: Draw) -> None:
        """Start near uniform."""
        super().__init__()
        self.draw = draw
        self.logits = nn.Parameter(torch.empty(shape).uniform_(-START, START))

    def forward(self) -> Tensor:
        """Return W [J, q, S]; each row sums to 1 over the skills."""
        return self.draw.weights(self.logits, training=self.training)

    @torch.no_grad()
    def load(self, rows: Tensor) -> None:
        """Set the logits."""
        self.logits.copy_(logits_of(rows))


@dataclass(frozen=True)
class Poly(Allocating):
    """Poly over one cluster of tasks."""

    num_skills: int = setting(4, "S, skills that all tasks share", whole(1, MAX_EXPERTS))

    name: ClassVar[str] = "poly"
    summary: ClassVar[str] = "shared skills whose factors are mixed into one LoRA for each task"

    @property
    def splits(self) -> int:
        """Q, blocks of inputs and outputs."""
        return 1

    def experts(self) -> tuple[Expert, ...]:
        """The skills."""
        return tuple(
            Expert(f"skill-{i}", "common", None, self.rank) for i in range(self.num_skills)
        )

    def exported_experts(self) -> tuple[Expert, ...]:
        """One own expert per task, the mixed factors."""
        return one_per_task(self.tasks, self.rank)

    def own_scales(self) -> Tensor:
        """1 / r."""
        return torch.full((self.num_skills,), 1.0 / self.rank)

    def shared(self) -> nn.Module | None:
        """Nothing is shared."""
        return None

    def gate(self, shared: nn.Module | None) -> Gate:
        """One allocation per site."""
        del shared
        return PolyGate((self.num_tasks, self.splits, self.num_skills), self.draw)

    def delta(self, in_features: int, out_features: int) -> Delta:
        """Factors that are mixed before they are multiplied."""
        return FactorDelta(
            (in_features, out_features),
            self.num_skills,
            self.rank,
            num_splits=self.splits,
            scale=self.scales()[0].item(),
            init_std=self.init_std,
        )


@dataclass(frozen=True)
class Mhr(Poly):
    """Multi-head routing: Poly with weights of its own for every block."""

    num_splits: int = setting(
        4, "q, blocks of inputs and outputs with weights of their own", whole(1, 4096)
    )

    name: ClassVar[str] = "mhr"
    summary: ClassVar[str] = "poly with weights of its own for every block of inputs and outputs"

    @property
    def splits(self) -> int:
        """Q, blocks of inputs and outputs."""
        return self.num_splits

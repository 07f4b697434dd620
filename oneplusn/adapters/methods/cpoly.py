"""C-Poly (arXiv 2312.03248), output mix: the paper's Eq. 1.

    y = W x + s * ( sum over common skills of w_A[t, i] phi_i(x)
                  + sum over specific skills of w_B[t, j] phi_j(x) )

Eq. 3: W_A [J, A] is learned through a Gumbel-sigmoid and normalised over each row, so the common
part of a row sums to 1. W_B [J, J*B] starts as the identity (each task its own skills) and is used
raw: it may grow negative or above 1, and off its diagonal a task borrows another task's skill.

Deviations: the noise of the Gumbel-sigmoid is off by default (sampled training gates and mean
inference gates differ for good); only the borrowings that are asked for may leave zero, so that a
task's own skills stay its own unless somebody says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods.base import Gate, Method, common_and_own

EPSILON = 1e-12


class CPolyGate(Gate):
    """The allocation [W_A | W_B] of one site."""

    may_use: Tensor

    def __init__(self, num_common: int, identity: Tensor, may_use: Tensor, *, noise: bool) -> None:
        """Start W_A uniform and W_B at the identity given.

        Args:
            num_common: A.
            identity: [J, J*B], 1 where the skill is the task's own.
            may_use: [J, J*B] bool, the own skills and those that may be borrowed.
            noise: sample W_A while training.
        """
        super().__init__()
        self.noise = noise
        self.common = nn.Parameter(torch.empty(len(identity), num_common).uniform_(-1e-3, 1e-3))
        self.specific = nn.Parameter(identity.clone())
        self.register_buffer("may_use", may_use)

    def forward(self) -> Tensor:
        """Return G [J, A + J*B]."""
        logits: Tensor = self.common
        if self.noise and self.training:
            uniform = torch.rand_like(logits).clamp(EPSILON, 1 - 1e-7)
            logits = logits + torch.logit(uniform)
        common = torch.sigmoid(logits)
        common = common / (common.sum(dim=-1, keepdim=True) + EPSILON)
        return torch.cat([common, self.specific * self.may_use], dim=-1)


@dataclass(frozen=True)
class CPoly(Method):
    """C-Poly over one cluster of tasks.

    Args:
        num_common: A, the skills that all tasks share.
        num_own: B, the skills that start as one task's own.
        rank: rows of each skill.
        own_rank: rows of each specific skill; None means rank.
        scale: s of every skill.
        borrows: task -> tasks whose specific skills it may use besides its own.
        noise: Gumbel noise on W_A while training.
    """

    num_common: int = 3
    num_own: int = 1
    rank: int = 4
    own_rank: int | None = None
    scale: float = 1.0
    borrows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    noise: bool = False

    name: ClassVar[str] = "c-poly"

    def experts(self) -> tuple[Expert, ...]:
        """The common skills, then each task's own; a borrowed one counts as common at load."""
        return common_and_own(
            self.tasks,
            num_common=self.num_common,
            num_own=self.num_own,
            rank=self.rank,
            own_rank=self.own_rank,
        )

    def scales(self) -> Tensor:
        """S for every skill."""
        return torch.full((len(self.experts()),), float(self.scale))

    def shared(self) -> nn.Module | None:
        """Nothing is shared: the paper's code keeps one allocation per layer."""
        return None

    def gate(self, shared: nn.Module | None) -> Gate:
        """One allocation [W_A | W_B] per site."""
        del shared
        owners = [expert.owner for expert in self.experts()[self.num_common :]]
        identity = torch.tensor([[float(owner == task) for owner in owners] for task in self.tasks])
        may_use = torch.tensor(
            [
                [owner == task or owner in self.borrows.get(task, ()) for owner in owners]
                for task in self.tasks
            ]
        )
        return CPolyGate(self.num_common, identity, may_use, noise=self.noise)

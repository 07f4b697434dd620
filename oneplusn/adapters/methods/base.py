"""The interface that every trainable method implements, and the torch form of its delta.

    y = W x + sum over e of G[task, e] * s_e * B_e (A_e x)

A method decides three things: which experts a cluster of J tasks has, the scale s_e of each, and
the module whose parameters give the gate rows G [J, E] of one site. Everything else (the factors A
and B, the product, the export) is the same for all methods and lives here once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert


class Gate(nn.Module, ABC):
    """Makes the gate rows of one site from its parameters."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Return G [J, E] fp32."""


@dataclass(frozen=True)
class Method(ABC):
    """What one method makes of a cluster's tasks. Subclasses add their settings as fields."""

    tasks: tuple[str, ...]

    name: ClassVar[str]

    @abstractmethod
    def experts(self) -> tuple[Expert, ...]:
        """Return the E experts in the order of the gate columns."""

    @abstractmethod
    def scales(self) -> Tensor:
        """Return s [E] fp32, the factor that each expert's output is multiplied with."""

    @abstractmethod
    def shared(self) -> nn.Module | None:
        """Return a module whose parameters the gates of all sites share, or None."""

    @abstractmethod
    def gate(self, shared: nn.Module | None) -> Gate:
        """Return the gate module of one site."""

    @property
    def num_tasks(self) -> int:
        """J."""
        return len(self.tasks)


def common_and_own(
    tasks: Sequence[str], *, num_common: int, num_own: int, rank: int, own_rank: int | None
) -> tuple[Expert, ...]:
    """Lay out the common experts, then each task's own, of rank `own_rank` or else `rank`."""
    common = [Expert(f"common-{i}", "common", None, rank) for i in range(num_common)]
    own = [
        Expert(f"{task}-{i}", "own", task, rank if own_rank is None else own_rank)
        for task in tasks
        for i in range(num_own)
    ]
    return (*common, *own)


class ExpertDelta(nn.Module):
    """The factors of all experts at one linear, and their gated sum.

    Semantics:
        delta[t] = sum over e of G[task(t), e] * s_e * B_e (A_e x[t])

    A starts Kaiming-uniform (a = sqrt 5) per expert and B at zero, as LoRA does, so an untrained
    cluster is the bare base.
    """

    a: nn.Parameter
    b: nn.Parameter
    rank_expert: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, experts: Sequence[Expert], scales: Tensor
    ) -> None:
        """Create A [R, K] and B [N, R], fp32, for experts of the ranks given."""
        super().__init__()
        ranks = [expert.rank for expert in experts]
        factors = []
        for rank in ranks:
            factor = torch.empty(rank, in_features)
            nn.init.kaiming_uniform_(factor, a=5**0.5)
            factors.append(factor)
        self.a = nn.Parameter(torch.cat(factors))
        self.b = nn.Parameter(torch.zeros(out_features, sum(ranks)))
        self.register_buffer(
            "rank_expert", torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
        )
        self.register_buffer("scale", scales[self.rank_expert])

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the delta [B, T, N] of x [B, T, K] under one gate row per sequence [B, E].

        Every sequence of the batch may belong to another task: one product with all experts, one
        mask per sequence, one product back. No loop over tasks and no per-row copy of A or B.
        """
        rank_gates = gates[:, self.rank_expert] * self.scale  # [B, R]
        hidden = nn.functional.linear(x, self.a.to(x.dtype))
        hidden = hidden * rank_gates.to(hidden.dtype).unsqueeze(1)
        return nn.functional.linear(hidden, self.b.to(hidden.dtype))

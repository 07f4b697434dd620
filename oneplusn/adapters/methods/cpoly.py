"""C-Poly (arXiv 2312.03248): common skills and a task's own, summed (the paper's Eq. 1).

    y = W x + s * ( sum over common skills of w_A[t, i] phi_i(x)
                  + sum over specific skills of w_B[t, j] phi_j(x) )

Eq. 3: W_A [J, A] is learned through a Gumbel-sigmoid and normalised over each row, so the common
part of a row sums to 1. W_B [J, J * B] starts as the identity (each task its own skills) and is
used raw: it may grow negative or above 1, and off its diagonal a task borrows another's skill.

The authors' published code differs from the paper: it mixes the factors instead of the outputs, has
B = 1 and a scale of 1 / r. `mix: factor` is that form, with `num_splits` as in MHR; `fixed_own`
is its variant "simple", where W_B stays one-hot.

Deviations:

* The noise of the Gumbel-sigmoid is off unless asked for: sampled gates in training and mean gates
  when served differ for good.
* Only the borrowings that are asked for may leave zero. Let all of them, and every task ends
  with a little of every other's skills, so that none can be dropped or served apart.
* The scale of the output mix is not given; it is 1, so that at the start a task's own skill has
  the factor of a plain LoRA with alpha = r.
* Linears that read the same x share their allocation, because they are one site when served; the
  code has one for each linear.
* The code raises for more than one task (its W_B rows are expanded to the wrong shape); what it
  evidently means is what is done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.checks import shown
from oneplusn.adapters.methods.base import (
    COUNT,
    RANK,
    Delta,
    FactorDelta,
    Gate,
    common_and_own,
    one_per_task,
)
from oneplusn.adapters.methods.settings import flag, one_of, setting, whole
from oneplusn.adapters.methods.sigmoid import START, Allocating, Draw, logits_of
from oneplusn.errors import InvalidRequest


class CPolyGate(Gate):
    """The allocation [W_A | W_B] of one site."""

    start: Tensor
    places: Tensor

    def __init__(
        self,
        common: tuple[int, int, int],
        start: Tensor,
        places: Tensor,
        draw: Draw,
        *,
        fixed: bool,
    ) -> None:
        """Start W_A near uniform and W_B as given.

        Args:
            common: shape of W_A: J, q (0 for an output mix, which has no blocks), A.
            start: W_B [J, J * B] at the start, 1 where the skill is the task's own.
            places: [n] where W_B may leave its start, as indices into it flattened.
            draw: of W_A.
            fixed: whether W_B stays as it starts.
        """
        super().__init__()
        self.draw = draw
        num_tasks, self.num_splits, num_common = common
        self.shape = (num_tasks, max(self.num_splits, 1), num_common)
        self.common = None
        if num_common:
            self.common = nn.Parameter(torch.empty(self.shape).uniform_(-START, START))
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.specific = None
        if len(places) and not fixed:
            self.specific = nn.Parameter(start.flatten()[places])

    def forward(self) -> Tensor:
        """Return G [J, A + J * B], or W [J, q, A + J * B] of a factor mix."""
        own = self.start
        common = own.new_empty(self.shape)  # of no element, unless it is replaced
        if self.common is not None:
            common = self.draw.weights(self.common, training=self.training)
        if self.specific is not None:
            own = own.flatten().index_copy(0, self.places, self.specific).view_as(own)
        own = own.unsqueeze(1).expand(-1, self.shape[1], -1)
        rows = torch.cat([common, own], dim=-1)
        return rows if self.num_splits else rows.squeeze(1)

    @torch.no_grad()
    def load(self, rows: Tensor) -> None:
        """Set logits and raw weights."""
        rows = rows.view(len(rows), -1, rows.shape[-1])
        num_common = self.shape[-1]
        if self.common is not None:
            self.common.copy_(logits_of(rows[..., :num_common]))
        if self.specific is not None:
            self.specific.copy_(rows[:, 0, num_common:].flatten()[self.places])


@dataclass(frozen=True)
class CPoly(Allocating):
    """C-Poly over one cluster of tasks."""

    num_common: int = setting(3, "A, skills that all tasks share", COUNT)
    num_own: int = setting(1, "B, skills that start as one task's own, for each task", COUNT)
    own_rank: int | None = setting(
        None,
        "rank rows of a specific skill; of a factor mix all have one rank",
        RANK.or_none("that of a common skill"),
    )
    borrows: Literal["none", "all"] | Mapping[str, Sequence[str]] = setting(
        "none",
        "whose specific skills a task may use besides its own: none, all, or task -> tasks",
    )
    fixed_own: bool = setting(False, "keep W_B one-hot, as the code's cpoly_simple", flag())
    mix: Literal["output", "factor"] = setting(
        "output",
        "add what the skills put out (the paper), or multiply mixed factors (the authors' code)",
        one_of("output", "factor"),
    )
    num_splits: int = setting(
        1, "q, blocks with common weights of their own; of a factor mix only", whole(1, 4096)
    )

    name: ClassVar[str] = "c-poly"
    summary: ClassVar[str] = "common skills by a sigmoid allocation, own skills by raw weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix == "output" and self.num_splits != 1:
            self._refuse("num_splits", "blocks are of the factor mix only; set mix: factor")
        if self.mix == "factor" and self.own_rank not in (None, self.rank):
            self._refuse("own_rank", f"factors to be mixed have one rank, here {self.rank}")
        if self.fixed_own and self.borrows != "none":
            self._refuse("borrows", "with fixed_own nothing can be borrowed; unset one of them")
        self._check_borrows()

    def _refuse(self, field: str, reason: str) -> None:
        value = shown(getattr(self, field))
        raise InvalidRequest(f"{self.name}: {field} is {value}; {reason}", param=field)

    def _check_borrows(self) -> None:
        if self.borrows in ("none", "all"):
            return
        if not isinstance(self.borrows, Mapping):
            self._refuse("borrows", "it is none, all, or a map of task to list of tasks")
        assert isinstance(self.borrows, Mapping)
        for task, lenders in self.borrows.items():
            if isinstance(lenders, str) or not isinstance(lenders, Sequence):
                self._refuse("borrows", f"what {shown(task)} borrows from is a list of tasks")
            for name in (task, *lenders):
                if name not in self.tasks:
                    known = ", ".join(self.tasks)
                    self._refuse("borrows", f"{shown(name)} is no task of this cluster: {known}")

    def experts(self) -> tuple[Expert, ...]:
        """The common skills, then each task's own; a borrowed one counts as common at load."""
        return common_and_own(
            self.tasks,
            num_common=self.num_common,
            num_own=self.num_own,
            rank=self.rank,
            own_rank=self.own_rank,
        )

    def exported_experts(self) -> tuple[Expert, ...]:
        """The skills of an output mix; of a factor mix one own expert per task."""
        return self.experts() if self.mix == "output" else one_per_task(self.tasks, self.rank)

    def own_scales(self) -> Tensor:
        """1 for an output mix, 1 / r for a factor mix."""
        scale = 1.0 if self.mix == "output" else 1.0 / self.rank
        return torch.full((len(self.experts()),), scale)

    def shared(self) -> nn.Module | None:
        """Nothing is shared: the paper's code keeps one allocation per layer."""
        return None

    def gate(self, shared: nn.Module | None) -> Gate:
        """One allocation [W_A | W_B] per site."""
        del shared
        owners = [expert.owner for expert in self.experts()[self.num_common :]]
        own = [[float(owner == task) for owner in owners] for task in self.tasks]
        places = [
            row * len(owners) + column
            for row, task in enumerate(self.tasks)
            for column, owner in enumerate(owners)
            if owner == task or self._may_borrow(task, owner)
        ]
        return CPolyGate(
            (self.num_tasks, self.num_splits if self.mix == "factor" else 0, self.num_common),
            torch.tensor(own),
            torch.tensor(places, dtype=torch.int64),
            self.draw,
            fixed=self.fixed_own,
        )

    def _may_borrow(self, task: str, owner: str | None) -> bool:
        if isinstance(self.borrows, str):
            return self.borrows == "all"
        return owner in self.borrows.get(task, ())

    def delta(self, in_features: int, out_features: int) -> Delta:
        """Factors that are mixed, or experts whose outputs are."""
        if self.mix == "output":
            return super().delta(in_features, out_features)
        return FactorDelta(
            (in_features, out_features),
            len(self.experts()),
            self.rank,
            num_splits=self.num_splits,
            scale=self.scales()[0].item(),
            init_std=self.init_std,
        )

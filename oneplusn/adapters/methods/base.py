"""The interface that every trainable method implements.

A method decides which experts a cluster of J tasks has, the scale of each, and the module whose
parameters give the gate rows of one site (or of the whole model). Everything else (the factors A
and B, the products, the export) is the same for all methods: `oneplusn.adapters.methods.deltas`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert, ModuleDelta
from oneplusn.adapters.checks import NAME, shown
from oneplusn.adapters.methods.deltas import Delta, ExpertDelta, FactorDelta
from oneplusn.adapters.methods.settings import check, number, setting, share, whole
from oneplusn.adapters.validation import MAX_EXPERTS, MAX_RANK, MAX_TASKS
from oneplusn.errors import InvalidRequest

__all__ = [
    "COUNT",
    "RANK",
    "Delta",
    "ExpertDelta",
    "FactorDelta",
    "FixedGate",
    "Gate",
    "GateScope",
    "Method",
    "common_and_own",
    "one_per_task",
]

GateScope = Literal["site", "model"]

RANK = whole(1, MAX_RANK)
COUNT = whole(0, MAX_EXPERTS)


class Gate(nn.Module, ABC):
    """Makes the gate rows of one site, or of the whole model, from its parameters."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the rows in fp32: G [J, E] of an output mix, W [J, q, E] of a factor mix."""

    @abstractmethod
    def load(self, rows: Tensor) -> None:
        """Set the parameters so that `forward` in evaluation gives these rows, or comes close.

        Whether they do is for the caller to compare: not every row is within a method's reach.
        """


@dataclass(frozen=True)
class Method(ABC):
    """What one method makes of a cluster's tasks. Subclasses add their settings as fields."""

    tasks: tuple[str, ...]
    rank: int = setting(4, "rank rows of an expert", RANK)
    alpha: float | None = setting(
        None,
        "scale as alpha / rank; not together with `scale`",
        number(0, 1e4).or_none("the method's own scale"),
    )
    scale: float | None = setting(
        None, "factor of every expert's output", number(0, 1e4).or_none("the method's own scale")
    )
    dropout: float = setting(0.0, "share of an expert's inputs dropped in training", share())
    init_std: float | None = setting(
        None,
        "A starts normal with this standard deviation",
        number(0, 10).or_none("LoRA's uniform within 1 / sqrt(inputs)"),
    )

    name: ClassVar[str]
    summary: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        self._check_tasks()
        check(self, self.name)
        if self.alpha is not None and self.scale is not None:
            raise InvalidRequest(
                f"{self.name}: alpha is {self.alpha} and scale is {self.scale}; set one of them",
                param="alpha",
            )
        self._check_experts()

    @abstractmethod
    def experts(self) -> tuple[Expert, ...]:
        """Return the E experts in training, in the order of the gate columns."""

    @abstractmethod
    def own_scales(self) -> Tensor:
        """Return s [E] fp32 as the method has it when neither alpha nor scale is set."""

    @abstractmethod
    def shared(self) -> nn.Module | None:
        """Return a module whose parameters the gates of all sites share, or None."""

    @abstractmethod
    def gate(self, shared: nn.Module | None) -> Gate:
        """Return the gate module of one site, or of the model where `gate_scope` says so."""

    @property
    def gate_scope(self) -> GateScope:
        """Whether every site has gates of its own or the model has one gate."""
        return "site"

    @property
    def num_tasks(self) -> int:
        """J."""
        return len(self.tasks)

    def scales(self) -> Tensor:
        """Return s [E] fp32, the factor that each expert's output is multiplied with."""
        if self.scale is not None:
            return torch.full((len(self.experts()),), float(self.scale))
        if self.alpha is not None:
            return torch.tensor([self.alpha / self.alpha_rank(e) for e in self.experts()])
        return self.own_scales()

    def alpha_rank(self, expert: Expert) -> int:
        """Return the rank that alpha is divided by for an expert."""
        return expert.rank

    def delta(self, in_features: int, out_features: int) -> Delta:
        """Return the untrained factors of one linear."""
        return ExpertDelta(
            in_features, out_features, self.experts(), self.scales(), init_std=self.init_std
        )

    def exported_experts(self) -> tuple[Expert, ...]:
        """Return the experts of the bundle; a factor mix has one of each task's own."""
        return self.experts()

    def export(self, delta: Delta, gates: Tensor, dtype: torch.dtype) -> ModuleDelta:
        """Return what the server loads for one linear, factors in `dtype`."""
        return delta.export(gates, dtype)

    def _check_tasks(self) -> None:
        if not 1 <= len(self.tasks) <= MAX_TASKS:
            raise InvalidRequest(
                f"{self.name}: {len(self.tasks)} tasks; a cluster has 1 to {MAX_TASKS}",
                param="tasks",
            )
        for task in self.tasks:
            if not isinstance(task, str) or NAME.fullmatch(task) is None:
                raise InvalidRequest(
                    f"task {shown(task)}: a name is 1 to 64 of a-z, 0-9, '.', '_', '-' and starts"
                    " with a letter or digit; rename it",
                    param="tasks",
                )
        twice = [task for task, count in Counter(self.tasks).items() if count > 1]
        if twice:
            raise InvalidRequest(
                f"task {twice[0]!r} is listed twice; remove one of them", param="tasks"
            )

    def _check_experts(self) -> None:
        experts = self.experts()
        if not 1 <= len(experts) <= MAX_EXPERTS:
            raise InvalidRequest(
                f"{self.name}: {len(experts)} experts; a cluster has 1 to {MAX_EXPERTS}, so change"
                " their counts",
                param="experts",
            )
        names = Counter(expert.name for expert in experts)
        for expert in (expert for expert in experts if expert.owner is not None):
            if NAME.fullmatch(expert.name) is None or names[expert.name] > 1:
                raise InvalidRequest(
                    f"task {expert.owner!r} makes an expert named {shown(expert.name)}, which is"
                    " taken or over 64 characters; rename the task",
                    param="tasks",
                )


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


def one_per_task(tasks: Sequence[str], rank: int) -> tuple[Expert, ...]:
    """Lay out one expert a task, of its name."""
    return tuple(Expert(task, "own", task, rank) for task in tasks)


class FixedGate(Gate):
    """A gate without parameters."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        """Keep the gate rows [J, E]."""
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)

    def forward(self) -> Tensor:
        """Return G [J, E]."""
        return self.rows

    def load(self, rows: Tensor) -> None:
        """Nothing can be set."""

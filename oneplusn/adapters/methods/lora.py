"""Plain LoRA, one expert a task (arXiv 2106.09685): delta = (alpha / r) B A x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods.base import Gate, Method


class FixedGate(Gate):
    """A gate without parameters."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        """Keep the gate rows [J, E]."""
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self) -> Tensor:
        """Return G [J, E]."""
        return self.rows


@dataclass(frozen=True)
class LoraPerTask(Method):
    """One LoRA of its own for each task; nothing is shared but the batch.

    Args:
        rank: rows of each task's A.
        alpha: the scale is alpha / rank; None means rank, a scale of 1.
    """

    rank: int = 8
    alpha: float | None = None

    name: ClassVar[str] = "lora"

    def experts(self) -> tuple[Expert, ...]:
        """One own expert per task."""
        return tuple(Expert(task, "own", task, self.rank) for task in self.tasks)

    def scales(self) -> Tensor:
        """Alpha / r for each."""
        alpha = self.rank if self.alpha is None else self.alpha
        return torch.full((self.num_tasks,), alpha / self.rank)

    def shared(self) -> nn.Module | None:
        """Nothing is shared."""
        return None

    def gate(self, shared: nn.Module | None) -> Gate:
        """The identity: each task sees its own expert only."""
        del shared
        return FixedGate(torch.eye(self.num_tasks))

"""Plain LoRA (arXiv 2106.09685, section 4.1): y = W x + (alpha / r) B A x.

Two ways to give it several tasks, the ends between which the gated methods lie: one LoRA of its
own for each task, where nothing is shared, and one LoRA for all, where nothing is apart.

Deviation: alpha is r unless set, so the scale is 1 at any rank. The paper sets alpha to the first
rank that it tries and then leaves it, which at that rank is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods.base import RANK, FixedGate, Gate, Method, one_per_task
from oneplusn.adapters.methods.settings import setting


@dataclass(frozen=True)
class LoraPerTask(Method):
    """One LoRA of its own for each task; nothing is shared but the batch."""

    rank: int = setting(8, "rank rows of each task's LoRA", RANK)

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "one plain LoRA for each task; nothing is shared"

    def experts(self) -> tuple[Expert, ...]:
        """One own expert per task."""
        return one_per_task(self.tasks, self.rank)

    def own_scales(self) -> Tensor:
        """1 for each."""
        return torch.ones(self.num_tasks)

    def shared(self) -> nn.Module | None:
        """Nothing is shared."""
        return None

    def gate(self, shared: nn.Module | None) -> Gate:
        """The identity: each task sees its own expert only."""
        del shared
        return FixedGate(torch.eye(self.num_tasks))


@dataclass(frozen=True)
class SharedLora(Method):
    """One LoRA for all tasks; nothing tells them apart."""

    rank: int = setting(8, "rank rows of the one LoRA", RANK)

    name: ClassVar[str] = "shared-lora"
    summary: ClassVar[str] = "one plain LoRA for all tasks; nothing tells them apart"

    def experts(self) -> tuple[Expert, ...]:
        """One common expert."""
        return (Expert("shared", "common", None, self.rank),)

    def own_scales(self) -> Tensor:
        """1."""
        return torch.ones(1)

    def shared(self) -> nn.Module | None:
        """No gate has parameters."""
        return None

    def gate(self, shared: nn.Module | None) -> Gate:
        """1 for every task."""
        del shared
        return FixedGate(torch.ones(self.num_tasks, 1))

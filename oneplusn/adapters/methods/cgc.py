"""CGC-LoRA (arXiv 2402.01684): common and own experts under a gate made from the task id alone.

The task-motivated gate of a layer (the paper's Eq. 4-6) is a linear map of a task embedding, turned
into weights by a softmax over the cluster's A common experts and the task's own B; other tasks'
experts get exactly zero, as in the customised gate control that the paper builds on (PLE, 2020):

    g = softmax(W_l emb[t])  over [A common, B own of t]
    y = W x + s * sum over e of g_e B_e (A_e x)

The gate reads no token and no hidden state, so it is a table once training ends.

Decided here, as the published text leaves it open, and deviations:

* One softmax over common and own experts (`softmax: joint`), as the parent method has it. The
  paper speaks of separate weight vectors, which may mean one softmax each: `softmax: group`.
* The scale is not given. With alpha / r an expert starts at a weight of about 1 / (A + B) and
  learns that much slower than a plain LoRA. So s is the number of experts in the softmax, and each
  starts with a factor of about 1: A + B for a joint softmax, A and B for two.
* Linears that read the same x (q, k, v; gate, up) share a gate, because they are one site when
  served; the paper has one for each layer. `gate_scope: model` has one for all, as MOELoRA.
* An own expert's rank may differ from a common one's; the paper has one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods.base import (
    COUNT,
    RANK,
    Gate,
    Method,
    common_and_own,
)
from oneplusn.adapters.methods.settings import one_of, setting, whole
from oneplusn.adapters.methods.softmax import TaskSoftmax, gather_own, spread_own


class CgcGate(Gate):
    """The gate of one site: softmax of a linear map of the shared task embedding."""

    def __init__(self, softmax: TaskSoftmax, num_common: int) -> None:
        """Take the weights over [A common, B own] of every task."""
        super().__init__()
        self.softmax = softmax
        self.num_common = num_common

    def forward(self) -> Tensor:
        """Return G [J, A + J * B], zero at other tasks' experts."""
        weights = self.softmax()
        common, own = weights[:, : self.num_common], weights[:, self.num_common :]
        return torch.cat([common, spread_own(own)], dim=-1)

    def load(self, rows: Tensor) -> None:
        """Solve the linear map for the rows."""
        common, own = rows[:, : self.num_common], rows[:, self.num_common :]
        self.softmax.load(torch.cat([common, gather_own(own)], dim=-1))


@dataclass(frozen=True)
class CgcLora(Method):
    """CGC-LoRA over one cluster of tasks."""

    num_common: int = setting(4, "A, experts that all tasks of the cluster share", COUNT)
    num_own: int = setting(1, "B, experts that only one task uses, for each task", COUNT)
    own_rank: int | None = setting(
        None, "rank rows of an own expert", RANK.or_none("that of a common expert")
    )
    softmax: Literal["joint", "group"] = setting(
        "joint",
        "one softmax over common and own experts, or one over each",
        one_of("joint", "group"),
    )
    gate_scope: Literal["site", "model"] = setting(
        "site", "gates for every site, or one gate for the model", one_of("site", "model")
    )
    embedding_dim: int = setting(64, "width of the task embedding", whole(1, 4096))

    name: ClassVar[str] = "cgc-lora"
    summary: ClassVar[str] = "common and own experts under a softmax made from the task's number"

    def experts(self) -> tuple[Expert, ...]:
        """The common experts, then each task's own."""
        return common_and_own(
            self.tasks,
            num_common=self.num_common,
            num_own=self.num_own,
            rank=self.rank,
            own_rank=self.own_rank,
        )

    def own_scales(self) -> Tensor:
        """The number of experts in an expert's softmax."""
        both = self.num_common + self.num_own
        joint = self.softmax == "joint"
        scales = {
            "common": both if joint else self.num_common,
            "own": both if joint else self.num_own,
        }
        return torch.tensor([float(scales[expert.kind]) for expert in self.experts()])

    def shared(self) -> nn.Module | None:
        """The task embedding [J, d], one for the model."""
        return nn.Embedding(self.num_tasks, self.embedding_dim)

    def gate(self, shared: nn.Module | None) -> Gate:
        """One linear map on the shared embedding."""
        assert isinstance(shared, nn.Embedding), "the gates read the embedding of shared()"
        sizes = (self.num_common, self.num_own)
        groups = (sum(sizes),) if self.softmax == "joint" else sizes
        return CgcGate(TaskSoftmax(shared, groups, owned=False), self.num_common)

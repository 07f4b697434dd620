"""CGC-LoRA (arXiv 2402.01684): common and own experts under a gate made from the task id alone.

The task-motivated gate of a layer is a linear map of a task embedding, turned into weights by a
softmax over the cluster's common experts and the task's own ones; other tasks' experts get exactly
zero, as in the customised gate control that the paper builds on:

    g = softmax(W_l emb[t])  over [A common, B own of t]
    y = W x + s * sum over e of g_e B_e (A_e x)

The gate reads no token and no hidden state, so it is a table once training ends.

Deviation: the published text does not give the scale. With s = alpha / r an expert starts at a
weight of about 1 / (A + B) and learns that much slower than a plain LoRA, so s defaults to
(A + B) * alpha / r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods.base import Gate, Method, common_and_own


class CgcGate(Gate):
    """The gate of one site: softmax of a linear map of the shared task embedding."""

    allowed: Tensor

    def __init__(self, embedding: nn.Embedding, allowed: Tensor) -> None:
        """Keep the shared embedding [J, d] out of this module's own parameters."""
        super().__init__()
        self._embedding = [embedding]  # a list, so that it is registered once, by its owner
        self.project = nn.Linear(embedding.embedding_dim, allowed.shape[1], bias=False)
        self.register_buffer("allowed", allowed)

    def forward(self) -> Tensor:
        """Return G [J, E]; each row sums to 1 over the experts that its task may use."""
        logits = self.project(self._embedding[0].weight)
        return torch.softmax(logits.masked_fill(~self.allowed, float("-inf")), dim=-1)


@dataclass(frozen=True)
class CgcLora(Method):
    """CGC-LoRA over one cluster of tasks.

    Args:
        num_common: A, the experts that all tasks of the cluster share.
        num_own: B, the experts that only one task uses.
        rank: rows of each common expert.
        own_rank: rows of each own expert; None means rank.
        scale: s; None means A + B, see the module's text.
        embedding_dim: width of the task embedding.
    """

    num_common: int = 4
    num_own: int = 1
    rank: int = 4
    own_rank: int | None = None
    scale: float | None = None
    embedding_dim: int = 64

    name: ClassVar[str] = "cgc-lora"

    def experts(self) -> tuple[Expert, ...]:
        """The common experts, then each task's own."""
        return common_and_own(
            self.tasks,
            num_common=self.num_common,
            num_own=self.num_own,
            rank=self.rank,
            own_rank=self.own_rank,
        )

    def scales(self) -> Tensor:
        """S for every expert."""
        scale = self.num_common + self.num_own if self.scale is None else self.scale
        return torch.full((len(self.experts()),), float(scale))

    def shared(self) -> nn.Module | None:
        """The task embedding [J, d], one for the model."""
        return nn.Embedding(self.num_tasks, self.embedding_dim)

    def gate(self, shared: nn.Module | None) -> Gate:
        """One linear map per site on the shared embedding."""
        if not isinstance(shared, nn.Embedding):
            message = "CGC-LoRA's gates read the task embedding that shared() returns"
            raise TypeError(message)
        allowed = torch.tensor(
            [[expert.owner in (None, task) for expert in self.experts()] for task in self.tasks]
        )
        return CgcGate(shared, allowed)

"""The gate that CGC-LoRA and MOELoRA have in common: task embedding, linear map, softmax.

    logits[t] = W emb[t],   weights[t] = softmax(logits[t])

It reads the task's number alone, no token and no hidden state, so it is a table after training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oneplusn.adapters.methods.base import Gate


class TaskSoftmax(nn.Module):
    """Weights of every task over groups of slots, each group a softmax of its own."""

    def __init__(self, embedding: nn.Embedding, groups: tuple[int, ...], *, owned: bool) -> None:
        """Make the linear map from an embedding [J, d] to all slots.

        Args:
            embedding: of the tasks.
            groups: slots of each softmax; empty groups are left out.
            owned: whether the embedding belongs to this module alone. One that others share is
                registered by the model, once.
        """
        super().__init__()
        self.groups = tuple(size for size in groups if size)
        self.project = nn.Linear(embedding.embedding_dim, sum(self.groups), bias=False)
        self._shared: list[nn.Embedding] = []
        if owned:
            self.embedding = embedding
        else:
            self._shared.append(embedding)  # in a list, so that it is not registered here

    def forward(self) -> Tensor:
        """Return [J, slots], fp32; each row sums to 1 over each group."""
        logits = self.project(self._table)
        parts = [torch.softmax(part, dim=-1) for part in logits.split(self.groups, dim=-1)]
        return torch.cat(parts, dim=-1)

    @torch.no_grad()
    def load(self, weights: Tensor) -> None:
        """Solve the linear map for weights [J, slots]; exact where d is at least J."""
        logits = weights.double().clamp_min(1e-30).log()
        solved = torch.linalg.lstsq(self._table.double(), logits).solution
        self.project.weight.copy_(solved.T)

    @property
    def _table(self) -> Tensor:
        table: Tensor = (self._shared[0] if self._shared else self.embedding).weight
        return table


def spread_own(weights: Tensor) -> Tensor:
    """Place each task's weights [J, B] of its own experts among those of all: [J, J * B]."""
    eye = torch.eye(len(weights), device=weights.device)
    return (eye.unsqueeze(-1) * weights.unsqueeze(1)).flatten(1)


def gather_own(rows: Tensor) -> Tensor:
    """Take each task's weights [J, B] of its own experts out of those of all [J, J * B]."""
    num_tasks = len(rows)
    blocks = rows.reshape(num_tasks, num_tasks, rows.shape[1] // num_tasks)
    return blocks.diagonal(dim1=0, dim2=1).T


class AllSoftmax(Gate):
    """One softmax over all experts."""

    def __init__(self, embedding: nn.Embedding, num_experts: int, *, owned: bool) -> None:
        """Make the linear map from an embedding [J, d] to the experts."""
        super().__init__()
        self.softmax = TaskSoftmax(embedding, (num_experts,), owned=owned)

    def forward(self) -> Tensor:
        """Return G [J, E]; each row sums to 1."""
        rows: Tensor = self.softmax()
        return rows

    def load(self, rows: Tensor) -> None:
        """Solve the linear map for the rows."""
        self.softmax.load(rows)

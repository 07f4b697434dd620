"""Measure a trained bundle: token accuracy per task, and what its gates say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.training.data import IGNORED_LABEL, Collate, TaskDataset

CHUNK = 256
SAME = 1e-6
"""Distances this close are equal: one-hot rows, of which none is nearer to another."""


@contextmanager
def attached(base: LlamaForCausalLM, bundle: Bundle) -> Iterator[Callable[[Tensor], None]]:
    """Add a bundle's deltas to a base; yields the function that sets each sequence's task [B]."""
    current: list[Tensor] = []

    def adder(delta: ModuleDelta) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        a, b = delta.a.float(), delta.b.float()
        columns = delta.weights.repeat_interleave(torch.tensor(delta.ranks), dim=1)  # [J, R]

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            hidden = (inputs[0] @ a.T) * columns[current[0]].unsqueeze(1)
            return output + hidden @ b.T

        return add

    hooks = [
        base.get_submodule(path).register_forward_hook(adder(delta))
        for path, delta in bundle.modules.items()
    ]

    def choose(task_ids: Tensor) -> None:
        current[:] = [task_ids]

    try:
        yield choose
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def accuracies(
    base: LlamaForCausalLM, bundle: Bundle, dataset: TaskDataset, *, pad_token_id: int
) -> dict[str, float]:
    """Return the share of the answers' letters that each task's row predicts.

    Every letter is predicted after the right ones before it; the end token does not count.
    """
    right = torch.zeros(len(bundle.tasks))
    total = torch.zeros(len(bundle.tasks))
    collate = Collate(pad_token_id)
    with attached(base, bundle) as choose:
        for start in range(0, len(dataset), CHUNK):
            rows = [dataset[i] for i in range(start, min(start + CHUNK, len(dataset)))]
            batch = collate(rows)
            choose(batch["task_ids"])
            logits = base(input_ids=batch["input_ids"]).logits
            wanted = batch["labels"][:, 1:]
            counted = (wanted != IGNORED_LABEL) & (wanted != base.config.eos_token_id)
            hits = ((logits[:, :-1].argmax(-1) == wanted) & counted).sum(1).float()
            right.index_add_(0, batch["task_ids"], hits)
            total.index_add_(0, batch["task_ids"], counted.sum(1).float())
    return dict(zip(bundle.tasks, (right / total).tolist(), strict=True))


def agreement(rows: Sequence[Tensor], clusters: Sequence[str]) -> float | None:
    """Score the clusters found in the gate rows against the planted ones: adjusted Rand index.

    The rows of all gates, one after the other, are clustered by cosine distance and average
    linkage into as many clusters as were planted. 1 is the planted partition, 0 what chance
    gives; None where one cluster was planted, or rows have nothing in common to be compared by.
    """
    table = nn.functional.normalize(torch.cat([row.flatten(1) for row in rows], dim=1), dim=1)
    pairs = torch.combinations(torch.arange(len(table)), 2)
    distances = (1 - (table[pairs[:, 0]] * table[pairs[:, 1]]).sum(1)).clamp_min(0)
    if len(set(clusters)) == 1 or bool((distances - distances[0]).abs().max() < SAME):
        return None
    found = fcluster(linkage(distances.double(), "average"), len(set(clusters)), "maxclust")
    return float(adjusted_rand_score(list(clusters), found))


def common_entropy(experts: Sequence[Expert], rows: Sequence[Tensor]) -> float | None:
    """Return the mean entropy of the rows over the common experts, 1 where uniform."""
    common = torch.tensor([expert.kind == "common" for expert in experts])
    count = int(common.sum())
    if count < 2:
        return None
    weights = torch.cat([row[..., common].flatten(0, -2) for row in rows]).abs()
    shares = weights / weights.sum(1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(1).mean()
    return float(entropy) / math.log(count)


def borrowed_mass(
    tasks: Sequence[str], experts: Sequence[Expert], rows: Sequence[Tensor]
) -> float | None:
    """Return the share of the weight on own experts that lies on other tasks' experts."""
    owners = [expert.owner for expert in experts]
    if not any(owners):
        return None
    own = torch.tensor([[owner == task for owner in owners] for task in tasks])
    others = torch.tensor([[owner not in (None, task) for owner in owners] for task in tasks])
    weights = sum(row.abs().flatten(1, -2).mean(1) if row.dim() == 3 else row.abs() for row in rows)
    assert isinstance(weights, Tensor)
    outside = float((weights * others).sum())
    return outside / (outside + float((weights * own).sum()))

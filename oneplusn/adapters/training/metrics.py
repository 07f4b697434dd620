"""Losses of completions, by task: in training, in validation, and beside the bare base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import EvalPrediction

from oneplusn.adapters.training.data import IGNORED_LABEL, Collate, Encoded

Logits = Callable[[Mapping[str, Tensor]], Tensor]
"""What computes logits [B, T, V] of a batch as `Collate` makes it."""


def completion_losses(logits: Tensor, labels: Tensor, task_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of every completion token and the task that it belongs to, both [n].

    Only these tokens' logits become fp32, so a prompt costs no memory for its vocabulary.

    Args:
        logits: [B, T, V].
        labels: [B, T], IGNORED_LABEL where there is no loss; the first token has none.
        task_ids: [B], or [B, T] of packed rows.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED_LABEL
    losses = cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="none")
    tasks = task_ids.unsqueeze(1) if task_ids.dim() == 1 else task_ids[:, 1:]
    return losses, tasks.expand_as(targets)[learned]


class TaskLosses:
    """A running sum of losses by task, on the device; reading it is the only synchronisation."""

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._sums: Tensor | None = None

    def add(self, losses: Tensor, tasks: Tensor) -> None:
        """Add losses [n] of tokens of tasks [n]."""
        if self._sums is None:
            self._sums = torch.zeros(2, self._num_tasks, device=losses.device)
        self._sums[0].index_add_(0, tasks, losses.detach())
        self._sums[1].index_add_(0, tasks, torch.ones_like(losses))

    def clear(self) -> None:
        """Forget what was added."""
        self._sums = None

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[float | None]:
        """Return the mean of each task, None for one that had no token.

        Args:
            reduce: sums [2, J] over the processes of a distributed run.
        """
        if self._sums is None:
            return [None] * self._num_tasks
        sums, counts = reduce(self._sums).tolist()
        return [a / b if b else None for a, b in zip(sums, counts, strict=True)]


@torch.no_grad()
def row_results(logits: Tensor, labels: Tensor) -> Tensor:
    """Return loss, number of completion tokens and exactness of every row, [B, 3].

    A row is exact when each token of its completion is the first choice after those before it,
    which is when greedy decoding gives the completion.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED_LABEL
    wanted, row = targets[learned], learned.nonzero()[:, 0]
    chosen = logits[:, :-1][learned]
    losses = cross_entropy(chosen.float(), wanted, reduction="none")
    results = torch.zeros(len(labels), 3, device=logits.device)
    results[:, 0].index_add_(0, row, losses)
    results[:, 1] = learned.sum(1)
    wrong = torch.zeros(len(labels), device=logits.device)
    wrong.index_add_(0, row, (chosen.argmax(-1) != wanted).float())
    results[:, 2] = wrong == 0
    return results


def by_task(
    results: np.ndarray[Any, Any], task_ids: np.ndarray[Any, Any], tasks: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return task -> mean loss of a token and share of exact rows; tasks without rows left out."""
    found = {}
    for index, task in enumerate(tasks):
        rows = results[task_ids == index]
        if len(rows):
            loss, tokens, exact = rows.astype(np.float64).sum(0).tolist()
            found[task] = {"loss": loss / tokens, "exact_match": exact / len(rows)}
    return found


class ValidationMetrics:
    """What the Trainer logs of a validation: eval_loss, and two figures for each task.

    eval_loss, by which the best checkpoint is chosen, is the mean over the tasks, not over the
    tokens: a task with long completions does not outweigh the others.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks

    def rows(self, logits: Tensor, labels: Any) -> Tensor:  # noqa: ANN401 - label_names' pair
        """Reduce logits to one line a row before they are gathered."""
        return row_results(logits, labels[0])

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the figures; the Trainer puts eval_ before their names."""
        labels: Any = prediction.label_ids
        task_ids = labels[1]
        measured = by_task(np.asarray(prediction.predictions), np.asarray(task_ids), self._tasks)
        figures = {"loss": math.fsum(m["loss"] for m in measured.values()) / len(measured)}
        for task, values in measured.items():
            figures |= {f"{task}_{name}": value for name, value in values.items()}
        return figures


@torch.no_grad()
def measure(
    logits_of: Logits,
    dataset: Dataset[Encoded],
    tasks: Sequence[str],
    *,
    collate: Collate,
    batch_size: int,
    label: str | None = None,
) -> dict[str, dict[str, float]]:
    """Measure loss and exact match of every task on a data set.

    Args:
        logits_of: see `Logits`.
        dataset: encoded examples.
        tasks: names that the examples' task ids index.
        collate: makes batches.
        batch_size: rows of one.
        label: of the progress bar; None shows none.
    """
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    results, task_ids = [], []
    for batch in tqdm(loader, desc=label, disable=label is None, leave=False):
        logits = logits_of(batch)
        results.append(row_results(logits, batch["labels"].to(logits.device)).cpu().numpy())
        task_ids.append(batch["task_ids"].numpy())
    return by_task(np.concatenate(results), np.concatenate(task_ids), tasks)

"""Find which tasks belong together: gradients along a short run of one shared LoRA.

One LoRA is trained on all tasks alike for a few steps. At the start and at some points after it,
each task's gradient is taken on several batches and compared with the others' (see `gradients`).
The mean over the points, each weighted by its reliability, is the affinity of two tasks. (CGC-LoRA,
arXiv 2402.01684, clusters tasks by "inter-task affinity" and leaves open how it is measured.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import PreTrainedModel

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.methods.base import ExpertDelta
from oneplusn.adapters.methods.lora import SharedLora
from oneplusn.adapters.training.data import Collate, TaskDataset
from oneplusn.adapters.training.gradients import Comparison, Gradients, Linear, compare
from oneplusn.adapters.training.model import ClusterModel
from oneplusn.errors import InvalidRequest
from oneplusn.kernels.plan import SiteSpec

LEAST_SIGNIFICANCE = 8.0
"""Below it tasks cannot be told apart. Equal tasks gave up to 5, since the scale that elements are
divided by is itself estimated; tasks of which some differ, 12 and more."""


@dataclass(frozen=True, slots=True)
class AffinitySettings:
    """How the affinity is measured.

    Args:
        rank: of the shared LoRA.
        steps: of its run.
        points: of the run at which gradients are compared, the start included.
        batches: of each task at each point; two halves of them are held against each other.
        batch_size: rows of such a batch, fewer where the task has too few rows.
        rows_per_task: rows of each task in a step of the run.
        learning_rate: of the run.
        clip: largest norm of its gradient.
        seed: of everything random.
        progress: show a bar.

    Raises:
        InvalidRequest: a number that is too small.
    """

    rank: int = 4
    steps: int = 40
    points: int = 5
    batches: int = 4
    batch_size: int = 8
    rows_per_task: int = 2
    learning_rate: float = 1e-3
    clip: float = 0.5
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        least = {"rank": 1, "steps": 1, "points": 1, "batches": 2, "batch_size": 1}
        for name, limit in (least | {"rows_per_task": 1}).items():
            value = getattr(self, name)
            if value < limit:
                raise InvalidRequest(f"{name} {value}: give at least {limit}", param=name)
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InvalidRequest(f"{name} {value}: give a number above 0", param=name)


@dataclass(frozen=True)
class Affinity:
    """How alike the tasks are.

    Attributes:
        tasks: names.
        matrix: [J, J] fp64 in 0..1, 1 on the diagonal; what is clustered.
        direction: [J, J] fp64 in -1..1; below 0 two tasks want opposite changes.
        reliability: of each point of the run.
        significance: mean over the points.
    """

    tasks: tuple[str, ...]
    matrix: Tensor
    direction: Tensor
    reliability: tuple[float, ...]
    significance: float

    @property
    def tells_apart(self) -> bool:
        """Whether the gradients differ between tasks by more than noise."""
        return self.significance >= LEAST_SIGNIFICANCE


def task_affinity(
    base: PreTrainedModel,
    dataset: TaskDataset,
    settings: AffinitySettings,
    *,
    pad_token_id: int,
    sites: Sequence[SiteSpec] | None = None,
) -> Affinity:
    """Measure the affinity of all pairs of tasks.

    Args:
        base: in fp32 or bf16; left as it was, but frozen.
        dataset: encoded examples; its tasks are compared.
        settings: see there.
        pad_token_id: fills up shorter rows.
        sites: where the shared LoRA is; all linears of the decoder layers by default.

    Raises:
        InvalidRequest: fewer than two tasks, too few rows of one, or a loss that is not finite.
    """
    _check(dataset, settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        method = SharedLora(dataset.tasks, rank=settings.rank)
        model = ClusterModel(base, method, sites or find_sites(base))
    try:
        points = _SharedRun(model.eval(), dataset, settings, Collate(pad_token_id)).compare()
    finally:
        model.detach()
    weights = torch.tensor([point.reliability for point in points]).double().clamp_min(0)
    shares = weights / weights.sum() if weights.any() else torch.full_like(weights, 1 / len(points))
    return Affinity(
        tasks=dataset.tasks,
        matrix=torch.einsum("p,pij->ij", shares, torch.stack([p.overlap for p in points])),
        direction=torch.einsum("p,pij->ij", shares, torch.stack([p.direction for p in points])),
        reliability=tuple(point.reliability for point in points),
        significance=float(np.mean([point.significance for point in points])),
    )


def _check(dataset: TaskDataset, settings: AffinitySettings) -> None:
    if len(dataset.tasks) < 2:
        raise InvalidRequest(
            f"one task ({', '.join(dataset.tasks)}) has nothing to be compared with; give two or"
            " more",
            param="tasks",
        )
    for task, size in zip(dataset.tasks, dataset.sizes, strict=True):
        if size < settings.batches:
            raise InvalidRequest(
                f"task {task!r} has {size} rows; {settings.batches} batches of each task need as"
                " many at least, so add rows, use fewer batches (2 or more), or leave the task out",
                param="tasks",
            )


class _SharedRun:
    """The short run of one LoRA over all tasks, with gradients at its points."""

    def __init__(
        self,
        model: ClusterModel,
        dataset: TaskDataset,
        settings: AffinitySettings,
        collate: Collate,
    ) -> None:
        self._model = model
        self._dataset = dataset
        self._settings = settings
        self._collate = collate
        self._rng = np.random.default_rng(settings.seed)
        self._parameters = model.expert_parameters()
        task_ids = np.asarray(dataset.task_ids)
        self._rows = [np.flatnonzero(task_ids == j) for j in range(len(dataset.tasks))]

    def compare(self) -> list[Comparison]:
        """Train, and compare the tasks at every point."""
        settings, linears = self._settings, _linears(self._model)
        spacing = np.linspace(0, settings.steps, settings.points)
        points = {int(step) for step in spacing.round()}
        passes = settings.steps + len(points) * len(self._rows) * settings.batches
        optimizer = AdamW(self._parameters, lr=settings.learning_rate, weight_decay=0.0)
        found = []
        with tqdm(
            total=passes, desc="affinity", unit="batch", disable=not settings.progress
        ) as bar:
            for step in range(max(points) + 1):
                if step:
                    bar.set_postfix_str(f"loss {self._step(optimizer):.4f}", refresh=False)
                    bar.update()
                if step in points:
                    found.append(compare(self._gradients(bar.update), linears))
        return found

    def _step(self, optimizer: AdamW) -> float:
        """Take one step on as many rows of each task."""
        count = self._settings.rows_per_task
        drawn = [self._rng.permutation(rows)[:count] for rows in self._rows]
        loss = self._loss(np.concatenate(drawn))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._settings.clip)
        optimizer.step()
        return _finite(loss, "the tasks together")

    def _gradients(self, update: Callable[[], Any]) -> Gradients:
        """Take the gradients of every task on batches of its own."""
        batches, size = self._settings.batches, self._settings.batch_size
        halves, variances = [], []
        for task, rows in zip(self._dataset.tasks, self._rows, strict=True):
            drawn = self._rng.permutation(rows)[: batches * size]
            gradients = []
            for part in np.array_split(drawn, batches):
                loss = self._loss(part)
                _finite(loss, f"task {task!r}")
                parts = torch.autograd.grad(loss, self._parameters)
                gradients.append(torch.cat([part.flatten().float().cpu() for part in parts]))
                update()
            stacked = torch.stack(gradients)
            middle = batches // 2
            halves.append(torch.stack([stacked[:middle].mean(0), stacked[middle:].mean(0)]))
            variances.append(stacked.var(0))
        return Gradients(torch.stack(halves), torch.stack(variances).mean(0))

    def _loss(self, indices: NDArray[np.int64]) -> Tensor:
        rows = [self._dataset[index] for index in indices.tolist()]
        device = self._model.base.device
        batch = {name: part.to(device) for name, part in self._collate(rows).items()}
        loss: Tensor = self._model(**batch).loss
        return loss


def _finite(loss: Tensor, whose: str) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise InvalidRequest(
            f"the loss of {whose} is {value}; load the base in float32, lower the learning rate,"
            " or look for a damaged row"
        )
    return value


def _linears(model: ClusterModel) -> list[Linear]:
    """List the linears in the order of the model's parameters."""
    linears: list[Linear] = []
    for delta in model.deltas:
        assert isinstance(delta, ExpertDelta)
        (rank, in_features), out_features = delta.a.shape, len(delta.b)
        start = linears[-1].stop if linears else 0
        linears.append(Linear(start, in_features, out_features, rank))
    return linears

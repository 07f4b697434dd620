"""Group tasks by their affinity: average linkage, and a number of clusters by silhouettes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score

from oneplusn.adapters.training.affinity import LEAST_SIGNIFICANCE, Affinity
from oneplusn.errors import InvalidRequest

LEAST_SILHOUETTE = 0.25
"""A split below it is none, as Kaufman and Rousseeuw (1990) advise. Unrelated tasks gave up to
0.23, planted groups 0.30 and more."""


@dataclass(frozen=True)
class Clustering:
    """Tasks in clusters, and why so many.

    Attributes:
        clusters: name -> tasks.
        linkage: [J - 1, 4] as scipy's, the merges of the dendrogram.
        silhouettes: number of clusters -> mean silhouette, of all numbers that were tried.
        reason: of the number of clusters, for the user.
    """

    clusters: Mapping[str, list[str]]
    linkage: NDArray[np.float64]
    silhouettes: Mapping[int, float]
    reason: str

    @property
    def cut(self) -> float:
        """The distance at which the tree falls into these clusters."""
        merges: list[float] = self.linkage[:, 2].tolist()
        heights = [0.0, *merges, merges[-1] * 1.1]
        last = len(merges) + 1 - len(self.clusters)
        return (heights[last] + heights[last + 1]) / 2

    def labels(self, tasks: Sequence[str]) -> list[int]:
        """Return the number of each task's cluster, from 0."""
        numbers = {t: i for i, members in enumerate(self.clusters.values()) for t in members}
        return [numbers[task] for task in tasks]


def cluster_tasks(affinity: Affinity, n: int | Literal["auto"]) -> Clustering:
    """Join tasks by average linkage on 1 - affinity.

    Args:
        affinity: of the tasks.
        n: number of clusters. `auto` takes that of 2 to J - 1 with the largest mean silhouette,
            and one cluster where it is below LEAST_SILHOUETTE, where the tasks cannot be told
            apart, or where they are two, which have no third to be held against.

    Raises:
        InvalidRequest: a number below 1 or above that of the tasks.
    """
    num_tasks = len(affinity.tasks)
    if n != "auto" and not 1 <= n <= num_tasks:
        raise InvalidRequest(
            f"{n} clusters of {num_tasks} tasks; give 1 to {num_tasks}, or auto", param="n"
        )
    distances = (1 - affinity.matrix).clamp_min(0).numpy()
    merges = linkage(squareform(distances, checks=False), method="average")
    labels = {count: cut_tree(merges, count)[:, 0] for count in range(1, num_tasks + 1)}
    silhouettes = {
        count: float(silhouette_score(distances, labels[count], metric="precomputed"))
        for count in range(2, num_tasks)
    }
    count, reason = (n, "as asked for") if n != "auto" else _choose(affinity, silhouettes)
    groups: dict[int, list[str]] = {}
    for task, label in zip(affinity.tasks, labels[count].tolist(), strict=True):
        groups.setdefault(label, []).append(task)
    clusters = {f"cluster-{i}": tasks for i, tasks in enumerate(groups.values(), start=1)}
    return Clustering(clusters, merges, silhouettes, reason)


def _choose(affinity: Affinity, silhouettes: Mapping[int, float]) -> tuple[int, str]:
    """Return the number of clusters and the reason."""
    if not affinity.tells_apart:
        return 1, (
            "the gradients do not tell the tasks apart: they differ by"
            f" {affinity.significance:.1f} standard deviations, and {LEAST_SIGNIFICANCE:g} is the"
            " least that counts; more batches may"
        )
    if not silhouettes:
        return 1, "two tasks have no third to be held against"
    best = max(silhouettes, key=lambda count: silhouettes[count])
    if silhouettes[best] < LEAST_SILHOUETTE:
        return 1, (
            f"no split stands out: the best, into {best}, has a silhouette of"
            f" {silhouettes[best]:.2f}, and {LEAST_SILHOUETTE} is the least that counts"
        )
    return best, f"the largest silhouette, {silhouettes[best]:.2f}"

"""Which examples an epoch draws, and in what order: a pure function of seed and epoch.

Nothing here keeps a state that a killed run would lose, and every process of a distributed run
computes the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


def quotas(sizes: Sequence[int], temperature: float) -> list[int]:
    """Return the draws of each task in an epoch; they sum to the number of examples.

    Semantics:
        p_j = n_j^(1 / temperature) / sum over i of n_i^(1 / temperature)

    rounded by largest remainder; at least one for a task that has examples. A temperature of 1
    draws every example once, infinity draws every task as often.
    """
    weights = np.array([0.0 if size == 0 else size ** (1.0 / temperature) for size in sizes])
    shares = weights / weights.sum() * sum(sizes)
    counts = np.maximum(np.floor(shares).astype(int), (weights > 0).astype(int))
    remainders = shares - counts
    while counts.sum() != sum(sizes):
        step = 1 if counts.sum() < sum(sizes) else -1
        allowed = np.where((weights > 0) & (counts + step > 0), remainders * step, -np.inf)
        chosen = int(np.argmax(allowed))
        counts[chosen] += step
        remainders[chosen] -= step
    found: list[int] = counts.tolist()
    return found


class TaskSampler(Sampler[int]):
    """Mixes the examples of all tasks, each task as often as its quota, in random order.

    A task's examples come one after the other from permutations of them all, so none comes again
    before every other has come, across epochs too.

    Args:
        task_ids: task of each example.
        temperature: see `quotas`.
        seed: of the permutations.
        epoch: tells which epoch an iteration is for.
    """

    def __init__(
        self,
        task_ids: Sequence[int],
        *,
        temperature: float,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        ids = np.asarray(task_ids)
        self._members = [np.flatnonzero(ids == task) for task in range(int(ids.max()) + 1)]
        self._quotas = quotas([len(members) for members in self._members], temperature)
        self._seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the draws of an epoch."""
        return sum(self._quotas)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the epoch that it is."""
        yield from self.draws(self.epoch())

    def draws(self, epoch: int) -> list[int]:
        """Return the indices of one epoch."""
        parts = [
            self._drawn(task, epoch * quota, quota)
            for task, quota in enumerate(self._quotas)
            if quota
        ]
        order = np.random.default_rng((self._seed, epoch)).permutation(np.concatenate(parts))
        indices: list[int] = order.tolist()
        return indices

    def _drawn(self, task: int, start: int, count: int) -> NDArray[np.int64]:
        """Return draws `start` to `start + count` of one task's permutations, end to end."""
        members = self._members[task]
        first, last = start // len(members), (start + count - 1) // len(members)
        cycles = [
            np.random.default_rng((self._seed, cycle, task, 1)).permutation(members)
            for cycle in range(first, last + 1)
        ]
        offset = start - first * len(members)
        return np.concatenate(cycles)[offset : offset + count]

"""Several short examples in one row, so that a batch is tokens and not padding.

Sequences of a row do not attend to each other: their positions start again at 0, from which the
attention masks of transformers tell them apart, and every token has its own task's gates.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, Sampler

from oneplusn.adapters.training.data import Encoded, PackedRow
from oneplusn.adapters.training.sampling import TaskSampler


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins, best fit from long to short; return the indices of each bin.

    Args:
        lengths: of the items, each at most `capacity`.
        capacity: of a bin.
    """
    bins: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(spaces, lengths[item])
        if at < len(spaces):
            space = spaces[at]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        left = space - lengths[item]
        if left not in with_space:
            insort(spaces, left)
        with_space.setdefault(left, []).append(chosen)
    return bins


class PackedSampler(Sampler[tuple[int, ...]]):
    """Draws as `TaskSampler` does, and yields the examples of one row at a time.

    Every epoch has as many rows as the first: in one whose draws need more, the last rows' draws
    are left to later epochs, and in one whose draws need fewer, the first rows come again.
    """

    def __init__(
        self,
        draws: TaskSampler,
        lengths: Sequence[int],
        *,
        row_tokens: int,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self._draws = draws
        self._lengths = lengths
        self._row_tokens = row_tokens
        self._seed = seed
        self.epoch = epoch
        self._num_rows = len(self._packed(0))

    def __len__(self) -> int:
        """Count the rows of an epoch."""
        return self._num_rows

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Yield the rows of the epoch that it is."""
        yield from self.rows(self.epoch())

    def rows(self, epoch: int) -> list[tuple[int, ...]]:
        """Return the rows of one epoch, in random order."""
        packed = self._packed(epoch)
        packed = (packed + packed)[: self._num_rows]
        order = np.random.default_rng((self._seed, epoch, 2)).permutation(len(packed))
        return [packed[index] for index in order]

    def _packed(self, epoch: int) -> list[tuple[int, ...]]:
        drawn = self._draws.draws(epoch)
        bins = pack([self._lengths[index] for index in drawn], self._row_tokens)
        return [tuple(drawn[place] for place in places) for places in bins]


class PackedDataset(Dataset[PackedRow]):
    """A dataset whose index is a tuple of examples, and whose item is one row of them all."""

    def __init__(self, dataset: Dataset[Encoded]) -> None:
        self._dataset = dataset

    def __getitem__(self, indices: tuple[int, ...]) -> PackedRow:
        """Return one row."""
        row: PackedRow = {"input_ids": [], "labels": [], "task_ids": [], "position_ids": []}
        for index in indices:
            example = self._dataset[index]
            length = len(example["input_ids"])
            row["input_ids"] += example["input_ids"]
            row["labels"] += example["labels"]
            row["task_ids"] += [example["task_ids"]] * length
            row["position_ids"] += range(length)
        return row

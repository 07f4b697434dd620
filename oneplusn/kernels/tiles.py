"""Cut the sorted rows of a plan into tiles, and say which runs the rows of each tile use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from oneplusn.kernels.plan import RunKey, Segment, SlotInfo

ABSENT = -1
"""In `Plan.ks`: the row does not use the run."""

IntArray = NDArray[np.int32]


class Tiles(NamedTuple):
    """The tiles of a plan; the fields are those of `Plan`."""

    tile_rows: IntArray
    tile_runs: IntArray
    runs: IntArray
    tile_ks: IntArray
    ks: IntArray


def cut_tiles(
    segments: Sequence[Segment],
    infos: Sequence[SlotInfo],
    clusters: Sequence[tuple[int, int]],
    tile_rows: int,
) -> Tiles:
    """Cut every cluster into tiles of up to `tile_rows` rows.

    Args:
        segments: The slots' spans of the sorted rows.
        infos: What the slot of each segment stands for.
        clusters: The clusters' spans.
        tile_rows: Largest number of rows of a tile.
    """
    cut = _Cut()
    first = 0
    for cluster_start, cluster_stop in clusters:
        for start in range(cluster_start, cluster_stop, tile_rows):
            stop = min(start + tile_rows, cluster_stop)
            while segments[first].stop <= start:
                first += 1
            last = first
            while segments[last].stop < stop:
                last += 1
            inside = slice(first, last + 1)
            counts = [min(s.stop, stop) - max(s.start, start) for s in segments[inside]]
            cut.append(infos[inside], counts)
    return cut.tiles


class _Cut:
    """The tiles while they are made. Lists: a call of numpy's for each tile costs far more."""

    def __init__(self) -> None:
        self._rows = [0]
        self._bounds = [0]
        self._ks_bounds = [0]
        self._runs: list[int] = []
        self._ks: list[int] = []

    @property
    def tiles(self) -> Tiles:
        """What has been appended."""
        lists = (self._rows, self._bounds, self._runs, self._ks_bounds, self._ks)
        return Tiles(*[np.array(values, dtype=np.int32) for values in lists])

    def append(self, infos: Sequence[SlotInfo], counts: Sequence[int]) -> None:
        """Append a tile with so many rows of each slot."""
        if len(infos) == 1:
            runs = [use.run for use in infos[0].uses]
            self._ks += [use.k for use in infos[0].uses] * counts[0]
        else:
            runs = _union(infos)
            place = {run: index for index, run in enumerate(runs)}
            for info, count in zip(infos, counts, strict=True):
                ks = [ABSENT] * len(runs)
                for run, k in info.uses:
                    ks[place[run]] = k
                self._ks += ks * count
        self._runs += runs
        self._rows.append(self._rows[-1] + sum(counts))
        self._bounds.append(len(self._runs))
        self._ks_bounds.append(len(self._ks))


def _union(infos: Iterable[SlotInfo]) -> list[int]:
    """Return the runs of several slots, in the order of their keys."""
    keys: dict[int, RunKey] = {}
    for info in infos:
        keys.update(zip(info.runs, info.run_keys, strict=True))
    return sorted(keys, key=keys.__getitem__)

"""Draw from rows of weights: what the filters keep of a row, and where a hashed number falls in it.

A row holds what is proportional to the probabilities of the tokens, by any factor. It is never
sorted: what matters lies among its largest weights, or is found by counting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Filters that keep fewer tokens than this are settled by the largest weights alone. Of a hundred
# thousand tokens, torch finds so many maxima of groups with a heap, several times as fast as more.
NUM_CANDIDATES = 24
MAX_CANDIDATES = 128  # as many are looked at for top-k, twice k: the last may tie with others
GROUP = 64  # columns that are reduced together before their maxima or sums are searched
SUBGROUP = 8  # the same, within the groups that were found
# The rightmost bits of a float by which weights of one class may differ, by less than 1 %.
CLASS_BITS = 16

Weights = npt.NDArray[np.float32]


class Filters(NamedTuple):
    """Parameters of the three filters, one entry a row: int64, fp64 and fp64 [n]."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def uniforms(seeds: Iterable[int], positions: Iterable[int]) -> npt.NDArray[np.float64]:
    """Hash every (seed, position) to a number in [0, 1).

    The finaliser of splitmix64 (Steele, Lea, Flood 2014) over the seed, then over the position's
    multiple of the golden ratio added to it.

    Returns:
        fp64 [n], multiples of 2**-52, so that u * x < x holds in fp64 for every x > 0.
    """
    seed = np.array([value & 0xFFFFFFFFFFFFFFFF for value in seeds], np.uint64)
    step = np.fromiter(positions, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(_mix(seed) + step)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread every bit of uint64 [n] over all of them; a bijection."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def draw_filtered(weights: Tensor, uniform: Tensor, filters: Filters) -> Tensor:
    """Draw a token of each row from what its filters keep.

    Args:
        weights: fp32 [n, whole groups], not negative, each row's sum positive; overwritten.
        uniform: fp64 [n] in [0, 1).
        filters: top_k 0, top_p 1 and min_p 0 keep everything.

    Returns:
        int64 [n].
    """
    # A row's own number, so that which way its token is found does not depend on other rows.
    widths = (2 * filters.top_k).clamp(NUM_CANDIDATES, MAX_CANDIDATES)
    largest, ids = largest_of(weights, int(widths.max()))
    threshold = smallest_kept(weights, largest, filters)
    beyond = largest.gather(1, widths.clamp(max=largest.shape[1])[:, None] - 1)[:, 0]
    ids, order = ids.sort(-1)
    candidates = largest.gather(1, order)
    reach = torch.where(candidates >= threshold[:, None], candidates, 0).double().cumsum(-1)
    hit = torch.searchsorted(reach, uniform[:, None] * reach[:, -1:], right=True)
    tokens = ids.gather(1, hit)[:, 0]
    # What is kept may go on beyond the candidates.
    rest = threshold <= beyond
    if rest.any():
        limits = threshold.tolist()
        for row in (rest & (threshold > 0)).nonzero()[:, 0].tolist():
            # Keeps what is larger than its limit, and so what is as large as ours.
            below = float(np.nextafter(np.float32(limits[row]), np.float32(0)))
            torch.nn.functional.threshold(weights[row], below, 0.0, inplace=True)
        tokens = torch.where(rest, draw(weights, uniform), tokens)
    return tokens


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Look a uniform number up in the cumulative distribution of each row.

    Semantics:
        out[i] = min {j : sum(weights[i, :j+1]) > uniform[i] * sum(weights[i])}

    By groups first, then within the group that was hit: one pass over the row instead of three.

    Args:
        weights: fp32 [n, whole groups], not negative, each row's sum positive.
        uniform: fp64 [n] in [0, 1).

    Returns:
        int64 [n].
    """
    groups = weights.unflatten(1, (-1, GROUP))
    sums = groups.sum(-1).double()
    reach = sums.cumsum(-1)
    target = uniform[:, None] * reach[:, -1:]
    hit = torch.searchsorted(reach, target, right=True)
    share = (target - (reach - sums).gather(1, hit)) / sums.gather(1, hit)
    members = groups[torch.arange(len(hit), device=hit.device), hit[:, 0]].double().cumsum(-1)
    target = share.clamp(0, 1 - 2.0**-52) * members[:, -1:]
    return (hit * GROUP + torch.searchsorted(members, target, right=True))[:, 0]


def largest_of(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the largest `count` values of each row and their ids, descending; all if fewer.

    They lie within the `count` groups whose maxima are largest, and there within as many smaller
    groups: several times faster than a search of whole rows. `values` is [n, whole groups].
    """
    levels: list[tuple[Tensor, int]] = []
    for size in (GROUP, SUBGROUP):
        pieces = values.unflatten(1, (-1, size))
        if pieces.shape[1] <= count:
            break
        best = pieces.amax(-1).topk(count, sorted=False).indices
        first = torch.arange(len(pieces), device=best.device)[:, None] * pieces.shape[1]
        values = pieces.flatten(0, 1).index_select(0, (best + first).flatten()).view(len(best), -1)
        levels.append((best, size))
    found, places = values.topk(min(count, values.shape[1]))
    for best, size in reversed(levels):
        places = best.gather(1, places // size) * size + places % size
    return found, places


def smallest_kept(weights: Tensor, largest: Tensor, filters: Filters) -> Tensor:
    """Find the smallest weight of each row that passes top-k, top-p and min-p.

    Semantics:
        p = weights / sum(weights);  kept = {v : weights[v] >= smallest_kept}

    Args:
        weights: fp32 [n, whole groups], not negative.
        largest: fp32 [n, W], the W largest of each row, descending.
        filters: top_k 0, top_p 1 and min_p 0 keep everything.

    Returns:
        fp32 [n]; 0 where no filter is on.
    """
    mass = weights.sum(-1).double()
    threshold = _threshold(largest, mass, filters)
    width = largest.shape[1]
    # What is kept may go on beyond the largest; for top-k so may those that tie with the last.
    kth = torch.where(filters.top_k > 0, _kth(largest, filters.top_k), torch.inf)
    is_on = (filters.top_k > 0) | (filters.top_p < 1) | (filters.min_p > 0)
    is_open = is_on & (torch.minimum(threshold, kth) <= largest[:, -1])
    rows = is_open.nonzero()[:, 0].tolist()
    if not rows or width == weights.shape[1]:
        return threshold
    rest = Filters(*(parameter[rows] for parameter in filters))
    if weights.device.type == "cpu":
        limits = zip(rows, mass[rows].tolist(), *(each.tolist() for each in rest), strict=True)
        found = [_search(weights[row], *limit) for row, *limit in limits]
        threshold[rows] = torch.tensor(found)
    else:
        threshold[rows] = _threshold(weights[rows].sort(descending=True).values, mass[rows], rest)
    return threshold


def _threshold(largest: Tensor, mass: Tensor, filters: Filters) -> Tensor:
    """Find the smallest kept weight, given that it is in `largest` [n, W], descending.

    `mass` [n] is the sum of the whole row.
    """
    width = largest.shape[1]
    after_k = torch.where(filters.top_k > 0, _kth(largest, filters.top_k), 0)[:, None]
    reach = torch.where(largest >= after_k, largest, 0).cumsum(-1, dtype=torch.float64)
    mass = torch.where(filters.top_k > 0, reach[:, -1], mass)
    last = torch.searchsorted(reach, (filters.top_p * mass)[:, None]).clamp(max=width - 1)
    after_p = torch.where(filters.top_p[:, None] < 1, largest.gather(1, last), 0)
    after_m = filters.min_p.to(largest.dtype)[:, None] * largest[:, :1]
    return torch.maximum(torch.maximum(after_k, after_p), after_m)[:, 0]


def _kth(largest: Tensor, top_k: Tensor) -> Tensor:
    """Return the weight that is number `top_k` [n] of its row in `largest`, or the last there."""
    place = (top_k - 1).clamp(0, largest.shape[1] - 1)
    return largest.gather(1, place[:, None])[:, 0]


def _search(row: Tensor, mass: float, top_k: int, top_p: float, min_p: float) -> float:
    """Find the smallest kept weight of a whole row [V], as `_threshold` does."""
    groups = row.view(-1, GROUP)
    tops = groups.amax(-1).numpy()
    smallest = float(np.float32(min_p) * tops.max())
    kept: Weights | None = None
    if top_k:
        count = min(top_k, len(row))
        kept = _holding(groups.numpy(), tops, np.arange(1, len(tops) + 1), count)
        smallest = max(smallest, after_k := _reaching(kept, count))
        kept = kept[kept >= after_k]
        mass = float(kept.sum(dtype=np.float64))
    if top_p < 1:
        if kept is None:
            reach = np.sort(tops)[::-1].cumsum(dtype=np.float64)
            kept = _holding(groups.numpy(), tops, reach, top_p * mass)
        smallest = max(smallest, _reaching(kept, top_p * mass, kept))
    return smallest


def _reaching(row: Weights, target: float, amounts: Weights | None = None) -> float:
    """Find the largest weight such that those not below it come to `target`, in sum or in number.

    By classes first, as weights that are not negative are ordered as their bits are; only the
    class that reaches the target is sorted.

    Args:
        row: fp32 [V], not negative.
        target: Positive; all of them count as reaching it.
        amounts: What each weight comes to, [V]; None = 1.
    """
    classes = row.view(np.int32) >> CLASS_BITS
    held = np.bincount(classes, amounts)
    reach = held[::-1].cumsum()
    target = min(target, reach[-1])
    place = int(np.searchsorted(reach, target))
    found = len(held) - 1 - place
    members = np.sort(row[classes == found])[::-1]
    gains = np.ones(len(members)) if amounts is None else members.astype(np.float64)
    inside = gains.cumsum() + (reach[place] - held[found])
    return float(members[min(int(np.searchsorted(inside, target)), len(members) - 1)])


def _holding(groups: Weights, tops: Weights, reach: npt.NDArray[Any], target: float) -> Weights:
    """Return the weights of those groups that hold the largest ones which come to `target`.

    The largest of each group come to no more than all weights that are as large. So once they reach
    the target, what is smaller than the smallest of them need not be looked at.

    Args:
        groups: fp32 [groups, GROUP].
        tops: fp32 [groups], the largest of each.
        reach: [groups], what they come to, the largest first.
        target: What is to be reached.
    """
    place = int(np.searchsorted(reach, target))
    if place < len(tops):
        groups = groups[tops >= np.sort(tops)[len(tops) - 1 - place]]
    return groups.reshape(-1)

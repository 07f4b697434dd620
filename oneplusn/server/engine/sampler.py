"""Pick the next token of every row of a step, each under its own parameters.

Order, as in transformers and vLLM: repetition, presence and frequency penalties -> logit bias and
masked end tokens -> temperature -> top-k -> top-p -> min-p. Each filter renormalises what the one
before it left. Equal logits are kept or dropped together.

A row's token depends on its logits, its parameters, its seed and its position, and on nothing
else: one number in [0, 1) is hashed from (seed, position) and looked up in the cumulative
distribution of the kept tokens in order of their ids. No generator has a state.

Log-probabilities are those of the model: the log-softmax of the raw logits, before everything
above (vLLM's `raw_logprobs`, OpenAI's numbers).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from oneplusn.server.engine.sequence import Sequence

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
TopTokens = list[tuple[int, float]]

# Filters that keep fewer tokens than this are settled without sorting the vocabulary.
NUM_CANDIDATES = 128
GROUP = 64  # columns that are reduced together before their maxima or sums are searched


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was picked, one entry a row.

    Attributes:
        tokens: The tokens.
        logprobs: Their log-probabilities, where asked for.
        top: The likeliest tokens with theirs, likeliest first, where asked for.
    """

    tokens: list[int]
    logprobs: list[float | None]
    top: list[TopTokens | None]


class Filters(NamedTuple):
    """Parameters of the three filters, one entry a row: int64, fp64 and fp64 [n]."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


class _Edits:
    """Changes to single logits of a batch, gathered row by row and applied at once."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._scales: list[tuple[Ids, Floats]] = []
        self._terms: list[tuple[Ids, Floats]] = []

    def scale(self, row: int, ids: npt.ArrayLike, penalty: float) -> None:
        """Divide the positive and multiply the negative logits of `ids`, each named once."""
        self._append(self._scales, row, ids, penalty)

    def add(self, row: int, ids: npt.ArrayLike, amounts: npt.ArrayLike) -> None:
        """Add to the logits of `ids`, after all scaling."""
        self._append(self._terms, row, ids, amounts)

    def apply(self, logits: Tensor) -> Tensor:
        """Return the changed logits in fp32 [M, V]; `logits` itself when there is no change."""
        if not self._scales and not self._terms:
            return logits
        scores = logits.to(torch.float32, copy=True)
        flat = scores.view(-1)
        if self._scales:
            places, penalties = _join(self._scales, scores.device)
            old = flat[places]
            flat[places] = torch.where(old > 0, old / penalties, old * penalties)
        if self._terms:
            places, amounts = _join(self._terms, scores.device)
            flat.index_add_(0, places, amounts)
        return scores

    def _append(
        self,
        edits: list[tuple[Ids, Floats]],
        row: int,
        ids: npt.ArrayLike,
        values: npt.ArrayLike,
    ) -> None:
        places = np.asarray(ids, np.int64) + row * self._num_columns
        edits.append((places, np.broadcast_to(np.asarray(values, np.float32), places.shape)))


def _join(edits: list[tuple[Ids, Floats]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Move all places and all values of a list of edits to the device, in two copies."""
    places, values = zip(*edits, strict=True)
    return (
        torch.from_numpy(np.concatenate(places)).to(device),
        torch.from_numpy(np.concatenate(values)).to(device),
    )


class Sampler:
    """Sampler of one engine. Keeps the distinct prompt tokens of penalised sequences, no more."""

    def __init__(self, eos_ids: Iterable[int] = ()) -> None:
        """Set the tokens that are masked, with a request's stop tokens, below `min_tokens`."""
        self._eos_ids = tuple(eos_ids)
        self._prompt_tokens: WeakKeyDictionary[Sequence, Ids] = WeakKeyDictionary()

    def sample(self, logits: Tensor, seqs: list[Sequence]) -> SampledTokens:
        """Pick one token for each sequence.

        Args:
            logits: Raw logits [M, V] of any float dtype; not modified.
            seqs: The M sequences, before the token is appended.
        """
        scores = self._adjust(logits, seqs)
        rows = [row for row, seq in enumerate(seqs) if seq.sampling.temperature > 0]
        tokens = _argmax(scores) if len(rows) < len(seqs) else [0] * len(seqs)
        if rows:
            picked = _sample_rows(scores[rows].float(), [seqs[row] for row in rows])
            for row, token in zip(rows, picked, strict=True):
                tokens[row] = token
        logprobs, top = _log_probabilities(logits, seqs, tokens)
        return SampledTokens(tokens, logprobs, top)

    def _adjust(self, logits: Tensor, seqs: list[Sequence]) -> Tensor:
        """Apply penalties, bias and masks. Returns fp32 [M, V], or `logits` if there are none."""
        edits = _Edits(logits.shape[1])
        for row, seq in enumerate(seqs):
            sampling = seq.sampling
            if sampling.repetition_penalty != 1:
                edits.scale(row, self._seen(seq), sampling.repetition_penalty)
            if seq.output and (sampling.presence_penalty or sampling.frequency_penalty):
                ids, counts = np.unique(seq.output, return_counts=True)
                penalty = sampling.presence_penalty + sampling.frequency_penalty * counts
                edits.add(row, ids, -penalty)
            if sampling.logit_bias:
                edits.add(row, list(sampling.logit_bias), list(sampling.logit_bias.values()))
            if len(seq.output) < sampling.min_tokens:
                eos_ids = () if sampling.ignore_eos else self._eos_ids
                edits.add(row, [*eos_ids, *sampling.stop_token_ids], -np.inf)
        return edits.apply(logits)

    def _seen(self, seq: Sequence) -> Ids:
        """List the distinct tokens of prompt and output."""
        prompt = self._prompt_tokens.get(seq)
        if prompt is None:
            prompt = self._prompt_tokens[seq] = np.unique(seq.prompt)
        return np.union1d(prompt, np.array(seq.output, np.int64))


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


def smallest_kept(scores: Tensor, largest: Tensor, filters: Filters) -> Tensor:
    """Find the smallest score of each row that passes top-k, top-p and min-p.

    Semantics:
        p = softmax(scores);  kept = {v : scores[v] >= smallest_kept}

    Args:
        scores: fp32 [n, V], the largest of each row 0, temperature applied.
        largest: fp32 [n, W], the W largest of each row, descending.
        filters: top_k 0, top_p 1 and min_p 0 keep everything.

    Returns:
        fp32 [n]; -inf where no filter is on.
    """
    mass = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    in_nucleus = ((filters.top_k == 0) & (filters.top_p < 1)).nonzero()[:, 0]
    if len(in_nucleus):
        mass[in_nucleus] = scores[in_nucleus].exp().sum(-1).double()
    threshold = _threshold(largest, mass, filters)
    width = largest.shape[1]
    active = (filters.top_k > 0) | (filters.top_p < 1) | (filters.min_p > 0)
    undecided = active & ((threshold <= largest[:, -1]) | (filters.top_k > width))
    rows = undecided.nonzero()[:, 0]
    if len(rows) and width < scores.shape[1]:
        rest = Filters(*(parameter[rows] for parameter in filters))
        threshold[rows] = _threshold(_sort_descending(scores[rows]), mass[rows], rest)
    return threshold


def _threshold(largest: Tensor, mass: Tensor, filters: Filters) -> Tensor:
    """Find the smallest kept score, given that it is in `largest` [n, W], descending from 0.

    `mass` [n] is the sum of exp over the whole row, read where top-p is on and top-k is off.
    """
    width = largest.shape[1]
    kth = (filters.top_k - 1).clamp(0, width - 1)[:, None]
    after_k = torch.where(filters.top_k[:, None] > 0, largest.gather(1, kth), -torch.inf)
    weights = torch.where(largest >= after_k, largest.double().exp(), 0)
    mass = torch.where(filters.top_k > 0, weights.sum(-1), mass)
    before = weights.cumsum(-1) - weights
    num_kept = (before < (filters.top_p * mass)[:, None]).sum(-1).clamp(1, width)[:, None]
    last = largest.gather(1, num_kept - 1)
    after_p = torch.where(filters.top_p[:, None] < 1, last, -torch.inf)
    after_m = filters.min_p.log().to(largest.dtype)[:, None]
    return torch.maximum(torch.maximum(after_k, after_p), after_m)[:, 0]


def _sample_rows(scores: Tensor, seqs: list[Sequence]) -> list[int]:
    """Draw one token a row from the filtered distributions of fp32 scores [n, V]."""
    device = scores.device
    params = [seq.sampling for seq in seqs]
    drawn = uniforms((seq.seed for seq in seqs), (seq.num_tokens for seq in seqs))
    uniform = torch.from_numpy(drawn).to(device)
    # Below the smallest normal number a temperature would divide 0 by 0; it is greedy long before.
    temperature = torch.tensor([max(param.temperature, 1e-30) for param in params], device=device)
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature[:, None]
    if not any(param.top_k or param.top_p < 1 or param.min_p for param in params):
        return _draw(scores.exp(), uniform).tolist()
    filters = Filters(
        torch.tensor([param.top_k for param in params], device=device),
        torch.tensor([param.top_p for param in params], dtype=torch.float64, device=device),
        torch.tensor([param.min_p for param in params], dtype=torch.float64, device=device),
    )
    values, ids = _largest(scores, NUM_CANDIDATES)
    threshold = smallest_kept(scores, values, filters)
    ids, order = ids.sort(-1)
    weights = _weights(values.gather(1, order), threshold)
    tokens = ids.gather(1, _draw(weights, uniform)[:, None])[:, 0]
    rest = (threshold <= values[:, -1]).nonzero()[:, 0]
    if len(rest):
        tokens[rest] = _draw(_weights(scores[rest], threshold[rest]), uniform[rest])
    return tokens.tolist()


def _weights(scores: Tensor, threshold: Tensor) -> Tensor:
    """Compute exp of the scores [n, W] that reach the threshold [n], 0 for the others."""
    return torch.where(scores >= threshold[:, None], scores, -torch.inf).exp_()


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Look a uniform number up in the cumulative distribution of each row.

    Semantics:
        out[i] = min {j : sum(weights[i, :j+1]) > uniform[i] * sum(weights[i])}

    By groups first, then within the group that was hit: one pass over the row instead of three.

    Args:
        weights: fp32 [n, W], not negative, each row's sum positive.
        uniform: fp64 [n] in [0, 1).

    Returns:
        int64 [n].
    """
    groups = pad(weights, (0, -weights.shape[1] % GROUP)).view(len(weights), -1, GROUP)
    sums = groups.sum(-1).double()
    reach = sums.cumsum(-1)
    target = uniform[:, None] * reach[:, -1:]
    hit = torch.searchsorted(reach, target, right=True)
    share = (target - (reach - sums).gather(1, hit)) / sums.gather(1, hit)
    members = groups[torch.arange(len(hit), device=hit.device), hit[:, 0]].double().cumsum(-1)
    target = share.clamp(0, 1 - 2.0**-52) * members[:, -1:]
    return (hit * GROUP + torch.searchsorted(members, target, right=True))[:, 0]


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the largest `count` scores of each row [n, V] and their ids, descending; all if fewer.

    They lie within the `count` groups of columns whose maxima are largest, which is 2.5 times
    faster to search on a CPU than the row is.
    """
    num_columns = scores.shape[1]
    num_groups = num_columns // GROUP
    if num_groups <= count:
        values, ids = scores.topk(min(count, num_columns))
        return values, ids
    grouped = scores[:, : num_groups * GROUP].unflatten(1, (num_groups, GROUP))
    best = grouped.amax(-1).topk(count).indices
    inner = grouped.gather(1, best[..., None].expand(-1, -1, GROUP)).flatten(1)
    tail = torch.arange(num_groups * GROUP, num_columns, device=scores.device)
    columns = (best[..., None] * GROUP + torch.arange(GROUP, device=scores.device)).flatten(1)
    columns = torch.cat((columns, tail.expand(len(scores), -1)), 1)
    values, places = torch.cat((inner, scores[:, tail]), 1).topk(count)
    return values, columns.gather(1, places)


def _sort_descending(scores: Tensor) -> Tensor:
    """Sort each row [n, V]; numpy does so 2.5 times faster on a CPU, as it carries no indices."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)[:, ::-1].copy())
    return scores.sort(-1, descending=True).values


def _argmax(scores: Tensor) -> list[int]:
    """Find the largest score of each row [M, V]; numpy does so 15 times faster on a CPU."""
    if scores.device.type == "cpu":
        best: list[int] = scores.float().numpy().argmax(-1).tolist()
        return best
    return scores.argmax(-1).tolist()


def _log_probabilities(
    logits: Tensor, seqs: list[Sequence], tokens: list[int]
) -> tuple[list[float | None], list[TopTokens | None]]:
    """Look up the log-probability of each token and of the likeliest ones, where asked for."""
    chosen: list[float | None] = [None] * len(seqs)
    top: list[TopTokens | None] = [None] * len(seqs)
    wanted = [(row, seq.sampling.logprobs) for row, seq in enumerate(seqs)]
    counts = {row: count for row, count in wanted if count is not None}
    if not counts:
        return chosen, top
    logs = logits[list(counts)].float().log_softmax(-1)
    values, ids = (part.tolist() for part in _largest(logs, max(1, *counts.values())))
    for index, (row, count) in enumerate(counts.items()):
        chosen[row] = logs[index, tokens[row]].item()
        top[row] = list(zip(ids[index][:count], values[index][:count], strict=True))
    return chosen, top

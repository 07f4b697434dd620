"""Pick the next token of every row of a step, each under its own parameters.

Order, as in transformers and vLLM: repetition, presence and frequency penalties -> logit bias and
masked end tokens -> grammar -> temperature -> top-k -> top-p -> min-p. Each filter renormalises
what the one before it left. Equal logits are kept or dropped together.

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

from oneplusn.server.engine.masks import TokenMasks
from oneplusn.server.engine.sequence import Sequence

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
TopTokens = list[tuple[int, float]]

# Filters that keep fewer tokens than this are settled without sorting the vocabulary.
NUM_CANDIDATES = 128
GROUP = 64  # columns that are reduced together before their maxima or sums are searched
# Below the smallest normal number a temperature would divide 0 by 0; it is greedy long before.
MIN_TEMPERATURE = 1e-30


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
    """Sampler of one engine.

    Owns a scratch buffer, as touching fresh memory costs more than the arithmetic on it, and the
    distinct prompt tokens of penalised sequences. Lives on the engine's thread.
    """

    def __init__(self, eos_ids: Iterable[int] = ()) -> None:
        """Set the tokens that are masked, with a request's stop tokens, below `min_tokens`."""
        self._eos_ids = tuple(eos_ids)
        self._prompt_tokens: WeakKeyDictionary[Sequence, Ids] = WeakKeyDictionary()
        self._scratch = torch.empty(0)
        self._masks = TokenMasks()

    @torch.inference_mode()
    def sample(self, logits: Tensor, seqs: list[Sequence]) -> SampledTokens:
        """Pick one token for each sequence.

        Args:
            logits: Raw logits [M, V] of any float dtype; not modified.
            seqs: The M sequences, before the token is appended.
        """
        scores = self._constrain(self._adjust(logits, seqs), logits, seqs)
        rows = [row for row, seq in enumerate(seqs) if seq.sampling.temperature > 0]
        tokens = _argmax(scores) if len(rows) < len(seqs) else [0] * len(seqs)
        if rows:
            drawing = [seqs[row] for row in rows]
            every = len(rows) == len(seqs)
            weights = self._weights(scores if every else scores[rows], drawing)
            picked = _sample_rows(weights, drawing)
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
            if len(seq.output) < sampling.min_tokens and seq.grammar is None:
                edits.add(row, self._early_ends(seq), -np.inf)
        return edits.apply(logits)

    def _constrain(self, scores: Tensor, logits: Tensor, seqs: list[Sequence]) -> Tensor:
        """Mask what the grammars of rows forbid. Returns `scores` changed, or a copy of `logits`.

        A grammar that allows nothing but an end is stronger than `min_tokens`.
        """
        rows = [row for row, seq in enumerate(seqs) if seq.grammar is not None]
        if not rows:
            return scores
        if scores is logits:
            scores = logits.to(torch.float32, copy=True)
        allowed = self._masks.rows(len(rows), logits.shape[1])
        for bits, row in zip(allowed, rows, strict=True):
            seq = seqs[row]
            assert seq.grammar is not None
            is_early = len(seq.output) < seq.sampling.min_tokens
            banned = self._early_ends(seq) if is_early else ()
            seq.grammar.fill(seq.output, bits, banned=banned)
        self._masks.apply(allowed, scores, rows)
        return scores

    def _early_ends(self, seq: Sequence) -> list[int]:
        """List the tokens that a sequence must not end with below `min_tokens`."""
        eos_ids = () if seq.sampling.ignore_eos else self._eos_ids
        return [*eos_ids, *seq.sampling.stop_token_ids]

    def _weights(self, scores: Tensor, seqs: list[Sequence]) -> Tensor:
        """Compute exp((score - the row's largest) / temperature) in the scratch buffer.

        Returns:
            fp32 [n, V rounded up to whole groups], padded with 0; valid until the next call.
        """
        num_rows, num_columns = scores.shape
        width = -(-num_columns // GROUP) * GROUP
        if self._scratch.numel() < num_rows * width or self._scratch.device != scores.device:
            self._scratch = torch.empty(num_rows * width, device=scores.device)
        padded = self._scratch[: num_rows * width].view(num_rows, width)
        padded[:, num_columns:] = 0
        weights = padded[:, :num_columns]
        temperatures = [max(seq.sampling.temperature, MIN_TEMPERATURE) for seq in seqs]
        divisor = torch.tensor(temperatures, dtype=torch.float32, device=scores.device)
        weights.copy_(scores)
        weights.sub_(weights.amax(-1, keepdim=True)).div_(divisor[:, None]).exp_()
        return padded

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


def smallest_kept(weights: Tensor, largest: Tensor, filters: Filters) -> Tensor:
    """Find the smallest weight of each row that passes top-k, top-p and min-p.

    Semantics:
        p = weights / sum(weights);  kept = {v : weights[v] >= smallest_kept}

    Args:
        weights: fp32 [n, V], not negative, the largest of each row 1.
        largest: fp32 [n, W], the W largest of each row, descending.
        filters: top_k 0, top_p 1 and min_p 0 keep everything.

    Returns:
        fp32 [n]; 0 where no filter is on.
    """
    mass = weights.sum(-1).double()
    threshold = _threshold(largest, mass, filters)
    width = largest.shape[1]
    is_on = (filters.top_k > 0) | (filters.top_p < 1) | (filters.min_p > 0)
    is_open = is_on & ((threshold <= largest[:, -1]) | (filters.top_k > width))
    rows = is_open.nonzero()[:, 0]
    if len(rows) and width < weights.shape[1]:
        rest = Filters(*(parameter[rows] for parameter in filters))
        threshold[rows] = _threshold(_sort_descending(weights[rows]), mass[rows], rest)
    return threshold


def _threshold(largest: Tensor, mass: Tensor, filters: Filters) -> Tensor:
    """Find the smallest kept weight, given that it is in `largest` [n, W], descending from 1.

    `mass` [n] is the sum of the whole row.
    """
    width = largest.shape[1]
    kth = (filters.top_k - 1).clamp(0, width - 1)[:, None]
    after_k = torch.where(filters.top_k[:, None] > 0, largest.gather(1, kth), 0)
    reach = torch.where(largest >= after_k, largest, 0).cumsum(-1, dtype=torch.float64)
    mass = torch.where(filters.top_k > 0, reach[:, -1], mass)
    last = torch.searchsorted(reach, (filters.top_p * mass)[:, None]).clamp(max=width - 1)
    after_p = torch.where(filters.top_p[:, None] < 1, largest.gather(1, last), 0)
    after_m = filters.min_p.to(largest.dtype)[:, None]
    return torch.maximum(torch.maximum(after_k, after_p), after_m)[:, 0]


def _sample_rows(weights: Tensor, seqs: list[Sequence]) -> list[int]:
    """Draw one token a row from the filtered weights, fp32 [n, whole groups]."""
    device = weights.device
    params = [seq.sampling for seq in seqs]
    numbers = uniforms((seq.seed for seq in seqs), (seq.num_tokens for seq in seqs))
    uniform = torch.from_numpy(numbers).to(device)
    if not any(param.top_k or param.top_p < 1 or param.min_p for param in params):
        return _draw(weights, uniform).tolist()
    filters = Filters(
        torch.tensor([param.top_k for param in params], device=device),
        torch.tensor([param.top_p for param in params], dtype=torch.float64, device=device),
        torch.tensor([param.min_p for param in params], dtype=torch.float64, device=device),
    )
    largest, ids = _largest(weights, NUM_CANDIDATES)
    threshold = smallest_kept(weights, largest, filters)[:, None]
    ids, order = ids.sort(-1)
    candidates = largest.gather(1, order)
    candidates = torch.where(candidates >= threshold, candidates, 0)
    tokens = ids.gather(1, _draw(candidates, uniform)[:, None])[:, 0]
    rest = (threshold <= largest[:, -1:]).nonzero()[:, 0]
    if len(rest):
        whole = weights[rest]
        tokens[rest] = _draw(torch.where(whole >= threshold[rest], whole, 0), uniform[rest])
    return tokens.tolist()


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
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


def _largest(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the largest `count` weights of each row and their ids, descending; all if fewer.

    They lie within the `count` groups whose maxima are largest, which a CPU searches 2.5 times
    faster than whole rows. `weights` is [n, whole groups], `count` a number of whole groups.
    """
    groups = weights.unflatten(1, (-1, GROUP))
    if groups.shape[1] <= count:
        values, ids = weights.topk(min(count, weights.shape[1]))
        return values, ids
    best = groups.amax(-1).topk(count).indices[..., None]
    inner = groups.gather(1, best.expand(-1, -1, GROUP)).flatten(1)
    ids = (best * GROUP + torch.arange(GROUP, device=weights.device)).flatten(1)
    values, places = inner.topk(count)
    return values, ids.gather(1, places)


def _sort_descending(weights: Tensor) -> Tensor:
    """Sort each row [n, V] of weights that are not negative."""
    if weights.device.type != "cpu":
        return weights.sort(-1, descending=True).values
    # Such floats are ordered as their bits are, and torch sorts one ascending row of int32 by
    # radix, 9 times faster than floats.
    rows = [row.sort().values for row in weights.view(torch.int32)]
    return torch.stack(rows).flip(-1).view(torch.float32)


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
    values, ids = (part.tolist() for part in logs.topk(min(max(counts.values()), logs.shape[1])))
    for index, (row, count) in enumerate(counts.items()):
        chosen[row] = logs[index, tokens[row]].item()
        top[row] = list(zip(ids[index][:count], values[index][:count], strict=True))
    return chosen, top

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
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oneplusn.kernels import draw_native
from oneplusn.kernels.draw_native import Draws
from oneplusn.server.engine.draws import GROUP, Filters, draw, draw_filtered, largest_of, uniforms
from oneplusn.server.engine.history import History
from oneplusn.server.engine.masks import TokenMasks
from oneplusn.server.engine.sequence import Sequence

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
TopTokens = list[tuple[int, float]]

# Below the smallest normal number a temperature would divide 0 by 0; it is greedy long before.
MIN_TEMPERATURE = 1e-30
NO_TOKEN = -1
"""Picked from a row that holds no distribution: the model or an adapter computed NaN or inf."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was picked, one entry a row.

    Attributes:
        tokens: The tokens; NO_TOKEN where there is none to be picked.
        logprobs: Their log-probabilities, where asked for.
        top: The likeliest tokens with theirs, likeliest first, where asked for.
    """

    tokens: list[int]
    logprobs: list[float | None]
    top: list[TopTokens | None]


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

    Owns a scratch buffer, as touching fresh memory costs more than the arithmetic on it, and what
    penalised sequences have said. Lives on the engine's thread.
    """

    def __init__(self, eos_ids: Iterable[int] = ()) -> None:
        """Set the tokens that are masked, with a request's stop tokens, below `min_tokens`."""
        self._eos_ids = tuple(eos_ids)
        self._histories: WeakKeyDictionary[Sequence, History] = WeakKeyDictionary()
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
            picked = self._draw(scores, rows, seqs)
            for row, token in zip(rows, picked, strict=True):
                tokens[row] = token
        logprobs, top = self._log_probabilities(logits, seqs, tokens)
        return SampledTokens(tokens, logprobs, top)

    def _adjust(self, logits: Tensor, seqs: list[Sequence]) -> Tensor:
        """Apply penalties, bias and masks. Returns fp32 [M, V], or `logits` if there are none."""
        edits = _Edits(logits.shape[1])
        for row, seq in enumerate(seqs):
            sampling = seq.sampling
            if sampling.repetition_penalty != 1:
                edits.scale(row, self._history(seq).tokens, sampling.repetition_penalty)
            if seq.output and (sampling.presence_penalty or sampling.frequency_penalty):
                ids, counts = self._history(seq).counted
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

    def _history(self, seq: Sequence) -> History:
        """Return what a sequence has said by now."""
        history = self._histories.get(seq)
        if history is None:
            history = self._histories[seq] = History(seq.prompt)
        history.read(seq.output)
        return history

    def _draw(self, scores: Tensor, rows: list[int], seqs: list[Sequence]) -> list[int]:
        """Draw a token of each of these rows of scores [M, V], or NO_TOKEN."""
        chosen = [seqs[row] for row in rows]
        params = [seq.sampling for seq in chosen]
        # Multiplied: dividing takes twice as long.
        factors = np.array([1 / max(p.temperature, MIN_TEMPERATURE) for p in params], np.float32)
        numbers = uniforms((seq.seed for seq in chosen), (seq.num_tokens for seq in chosen))
        top_k = np.array([param.top_k for param in params], np.int64)
        top_p = np.array([param.top_p for param in params], np.float64)
        min_p = np.array([param.min_p for param in params], np.float64)
        if draw_native.takes(scores):
            places = np.array(rows, np.int64)
            return draw_native.draw(scores, Draws(places, factors, top_k, top_p, min_p, numbers))
        padded, device = self._padded(scores, rows), scores.device
        padded.mul_(torch.from_numpy(factors).to(device)[:, None])
        weights = torch.softmax(padded, -1, out=padded)
        lost = ~weights[:, 0].isfinite()  # NaN is all of a row, or nothing
        weights[lost] = 1.0
        uniform = torch.from_numpy(numbers).to(device)
        if not any(param.top_k or param.top_p < 1 or param.min_p for param in params):
            tokens = draw(weights, uniform)
        else:
            filters = (torch.from_numpy(each).to(device) for each in (top_k, top_p, min_p))
            tokens = draw_filtered(weights, uniform, Filters(*filters))
        return tokens.masked_fill(lost, NO_TOKEN).tolist()

    def _padded(self, scores: Tensor, rows: list[int]) -> Tensor:
        """Copy these rows of scores [M, V] into the scratch buffer.

        Returns:
            fp32 [n, V rounded up to whole groups], padded with -inf; valid until the next call.
        """
        num_rows, num_columns = len(rows), scores.shape[1]
        width = -(-num_columns // GROUP) * GROUP
        if self._scratch.numel() < num_rows * width or self._scratch.device != scores.device:
            self._scratch = torch.empty(num_rows * width, device=scores.device)
        padded = self._scratch[: num_rows * width].view(num_rows, width)
        padded[:, num_columns:] = -torch.inf
        if num_rows == len(scores):
            padded[:, :num_columns] = scores
        else:
            for place, row in enumerate(rows):
                padded[place, :num_columns] = scores[row]
        return padded

    def _log_probabilities(
        self, logits: Tensor, seqs: list[Sequence], tokens: list[int]
    ) -> tuple[list[float | None], list[TopTokens | None]]:
        """Look up the log-probability of each token and of the likeliest ones, where asked for."""
        chosen: list[float | None] = [None] * len(seqs)
        top: list[TopTokens | None] = [None] * len(seqs)
        wanted = [(row, seq.sampling.logprobs) for row, seq in enumerate(seqs)]
        counts = {row: count for row, count in wanted if count is not None}
        if not counts:
            return chosen, top
        scores = self._padded(logits, list(counts))
        places = torch.tensor([[max(0, tokens[row])] for row in counts], device=scores.device)
        own = scores.gather(1, places)
        best, ids = largest_of(scores, max(1, *counts.values()))
        weights = torch.softmax(scores, -1, out=scores)
        # log(sum(exp(score))), from the weight of the best score: one pass over the row, not three.
        whole = best[:, :1] - (weights.gather(1, ids[:, :1]) / weights.sum(-1, keepdim=True)).log()
        listed = zip(ids.tolist(), (best - whole).tolist(), strict=True)
        logs = (own - whole)[:, 0].tolist()
        for (row, count), pair, log in zip(counts.items(), listed, logs, strict=True):
            chosen[row] = log
            top[row] = list(zip(*pair, strict=True))[:count]
        return chosen, top


def _argmax(scores: Tensor) -> list[int]:
    """Find the largest score of each row [M, V], or NO_TOKEN where that is NaN or infinite."""
    if scores.device.type == "cpu":  # numpy does so 15 times faster there
        values = scores.float().numpy()
        best = values.argmax(-1)
        sound = np.isfinite(values[np.arange(len(best)), best])
        picked: list[int] = np.where(sound, best, NO_TOKEN).tolist()
        return picked
    top, ids = scores.max(-1)
    return torch.where(top.isfinite(), ids, NO_TOKEN).tolist()


def failure_of(seq: Sequence, token: int) -> str | None:
    """Say why a sequence cannot go on after a step; None where it can."""
    if seq.grammar is not None and seq.grammar.failure is not None:
        return seq.grammar.failure
    if token != NO_TOKEN:
        return None
    return "the model or the adapter computed NaN or infinite scores; check the adapter's weights"

"""Bit masks over the vocabulary, put on logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bits = npt.NDArray[np.int32]

# What a byte of a mask adds to the logits of its eight tokens: 0 or -inf. fp32 [256, 8].
_TERMS = torch.tensor(
    [[0.0 if byte >> bit & 1 else -torch.inf for bit in range(8)] for byte in range(256)]
)


class TokenMasks:
    """Scratch memory for the masks of one step, and their way onto the logits."""

    def __init__(self) -> None:
        self._bits = np.empty((0, 0), np.int32)
        self._terms = _TERMS

    def rows(self, count: int, vocab_size: int) -> Bits:
        """Return masks to fill, int32 [count, V / 32 rounded up], valid until the next call.

        A set bit allows a token; the first token has the lowest bit.
        """
        width = -(-vocab_size // 32)
        if self._bits.shape[0] < count or self._bits.shape[1] != width:
            self._bits = np.empty((count, width), np.int32)
        return self._bits[:count]

    def apply(self, masks: Bits, scores: Tensor, rows: Sequence[int]) -> None:
        """Set the scores of forbidden tokens to -inf, in place.

        Semantics:
            scores[rows[i], v] = -inf where bit v of masks[i] is 0

        Args:
            masks: int32 [n, V / 32 rounded up].
            scores: fp32 [M, V], finite or -inf.
            rows: Rows of the masks, each named once.
        """
        if self._terms.device != scores.device:
            self._terms = _TERMS.to(scores.device)
        # Row by row: the terms of one row stay in the cache, those of all do not.
        flat = torch.from_numpy(masks.view(np.uint8)).to(scores.device)
        for mask, row in zip(flat, rows, strict=True):
            terms = self._terms.index_select(0, mask.int()).flatten()
            scores[row].add_(terms[: scores.shape[1]])

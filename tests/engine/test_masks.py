from __future__ import annotations

import numpy as np
import pytest
import torch

from oneplusn.server.engine.masks import TokenMasks


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 259])
def test_forbidden_tokens_become_impossible_and_the_rest_stays_bit_for_bit(vocab_size) -> None:
    rng = np.random.default_rng(vocab_size)
    wanted = rng.random((3, vocab_size)) < 0.5
    masks = TokenMasks()
    bits = masks.rows(3, vocab_size)
    for row, allowed in zip(bits, wanted, strict=True):
        packed = np.packbits(allowed, bitorder="little")
        row.view(np.uint8)[: len(packed)] = packed
    scores = torch.randn(5, vocab_size)
    before = scores.clone()

    masks.apply(bits, scores, rows=[4, 0, 2])

    for row, allowed in zip((4, 0, 2), wanted, strict=True):
        assert torch.equal(scores[row, allowed], before[row, allowed])
        assert torch.all(scores[row, ~allowed] == -torch.inf)
    assert torch.equal(scores[[1, 3]], before[[1, 3]])


def test_memory_is_kept_for_as_many_rows_as_there_were() -> None:
    masks = TokenMasks()
    first = masks.rows(4, 100)

    assert masks.rows(2, 100).base is first.base
    assert masks.rows(5, 100).shape == (5, 4)
    assert masks.rows(5, 200).shape == (5, 7)

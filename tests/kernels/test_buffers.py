"""Buffers begin where a line of memory does, large pages or not."""

from __future__ import annotations

import pytest
import torch

from oneplusn.kernels.buffers import HUGE_PAGE, LARGE, LINE, zeros


@pytest.mark.parametrize("shape", [(1,), (3, 16, 577), (LARGE,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("in_large_pages", [False, True])
def test_a_buffer_is_of_zeros_and_begins_at_a_line(
    shape: tuple[int, ...], dtype: torch.dtype, in_large_pages: bool
) -> None:
    buffer = zeros(shape, dtype, in_large_pages=in_large_pages)
    assert (buffer.shape, buffer.dtype) == (shape, dtype)
    assert buffer.data_ptr() % (HUGE_PAGE if in_large_pages and shape == (LARGE,) else LINE) == 0
    assert not buffer.any()

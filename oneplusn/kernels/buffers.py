"""Large buffers that cost nothing until they are written, in large pages where that pays."""

from __future__ import annotations

import mmap
from math import prod

import numpy as np
import torch
from torch import Tensor

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

LINE = 64
"""Bytes of a line of memory, at which every buffer begins: no vector is read from two."""
HUGE_PAGE = 2 << 20
"""Bytes of a large page on x86 and of the smallest on 64-bit Arm with pages of 4 KiB."""
LARGE = 2 * HUGE_PAGE
"""Bytes from which a buffer asks for large pages."""
MAPPED = 1 << 18
"""Bytes from which a buffer has a mapping of its own. What the C library had given back it would
write with zeros, and so commit: 150 MB of the first gigabyte of pages after a model was loaded."""


def zeros(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    in_large_pages: bool = False,
) -> Tensor:
    """Allocate zeros that the system commits page by page when they are first written.

    `torch.zeros` on the CPU writes all of them here and now, which takes 41 s for 4 GiB on a
    virtual machine.

    Args:
        shape: Of the tensor.
        dtype: Of the tensor.
        device: Where it lies.
        in_large_pages: Commit 2 MiB at a time, where the system can: for what is read from end to
            end. One thread read 16 GB/s of weights through pages of 4 KiB and 31 through these.
    """
    size = prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    if in_large_pages and size >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        raw = _large(size)
    elif size >= MAPPED:
        raw = np.frombuffer(mmap.mmap(-1, size, flags=PRIVATE), np.uint8)
    else:
        raw = _aligned(np.zeros(size + LINE, np.uint8), size, LINE)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _aligned(whole: Bytes, size: int, unit: int) -> Bytes:
    begin = -whole.ctypes.data % unit
    return whole[begin : begin + size]


def _large(size: int) -> Bytes:
    """Map zeros that begin at a large page, and ask for large pages."""
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=PRIVATE)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(np.frombuffer(mapped, np.uint8), size, HUGE_PAGE)

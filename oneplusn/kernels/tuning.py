"""Block shapes of the Triton kernels, each with the figure or the estimate that chose it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from oneplusn.kernels.plan import SiteSpec

DECODE_ROWS = 256
"""Batches up to here are cut into tiles of 16 rows, larger ones into tiles of 64."""
INTERPRETER_PROGRAMS = 4


class Shape(NamedTuple):
    """Block shapes of one site.

    Attributes:
        block_n: Columns of an expand item.
        block_k: Columns of x that one turn of the shrink loop reads.
        split_k: Columns of x that a shrink item reads. Of the site alone, never of the batch: a
            sum over K is cut at the same places in any batch.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        programs: Programs per multiprocessor.
    """

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    programs: int


class Choice(NamedTuple):
    """A shape, and why it."""

    shape: Shape
    reason: str


def tile_rows(num_rows: int) -> int:
    """Return how many rows the tiles of a step with `num_rows` have at most."""
    return 16 if num_rows <= DECODE_ROWS else 64


def shape_of(spec: SiteSpec, tile_rows: int, device: torch.device) -> Choice:
    """Return the block shapes of a site, for tiles of so many rows."""
    if device.type != "cuda":
        shape = Shape(block_n=32, block_k=32, split_k=64, num_warps=1, num_stages=1, programs=1)
        return Choice(shape, "interpreter: several blocks and parts at the widths of a tiny model")
    if tile_rows > 16:
        shape = Shape(128, 64, 4096, num_warps=4, num_stages=3, programs=2)
        return Choice(shape, "estimate")
    split_k = 512 if spec.in_features <= 8192 else 1024
    return Choice(Shape(128, 128, split_k, num_warps=4, num_stages=3, programs=2), "estimate")


def programs(shape: Shape, device: torch.device) -> int:
    """Return how many programs draw tickets."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return _multiprocessors(device) * shape.programs


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

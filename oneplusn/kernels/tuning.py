"""Block shapes of the Triton kernels, each with the figure or the estimate that chose it.

The table is read from the top; the first row that fits decides. None was measured on a GPU yet:
`make gpu-smoke` with `--tune` prints the rows that should stand here.
"""

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
        max_registers: Bound for the assembler, which else spills a few bytes to get below the next
            step of 128 or 168; None = its own choice.
    """

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    programs: int
    max_registers: int | None = None

    def splits(self, in_features: int) -> int:
        """Return the number of parts that K is cut into."""
        return -(-in_features // self.split_k)

    def even(self, in_features: int) -> bool:
        """Whether every part of K is whole blocks, so that nothing is masked along K."""
        return in_features % self.split_k == 0 and self.split_k % self.block_k == 0


class Choice(NamedTuple):
    """A row of the table.

    Attributes:
        capability: Least compute capability, as major * 10 + minor.
        tile_rows: Largest number of rows of the plan's tiles.
        min_columns: Least number N of columns of all slices.
        min_features: Least width K of x.
        shape: What to use; its `split_k` is a goal, see `even_split`.
        reason: The figure or the estimate that chose it.
    """

    capability: int
    tile_rows: int
    min_columns: int
    min_features: int
    shape: Shape
    reason: str


TABLE = (
    Choice(
        90,
        16,
        16_384,
        0,
        Shape(256, 128, 512, num_warps=4, num_stages=3, programs=2),
        "estimate: 28,672 columns in blocks of 128 are 224 tickets a tile, each about a "
        "microsecond of metadata and waiting; blocks of 256 halve them, at 142 registers",
    ),
    Choice(
        80,
        16,
        0,
        0,
        Shape(128, 128, 512, num_warps=4, num_stages=3, programs=2, max_registers=168),
        "estimate: eight parts of K = 4,096 give 64 to 192 shrink items for eight chunks, one "
        "wave on 132 multiprocessors; blocks of 256 columns spill 4 bytes on sm_80",
    ),
    Choice(
        80,
        64,
        0,
        0,
        Shape(64, 64, 2048, num_warps=4, num_stages=3, programs=2, max_registers=168),
        "estimate: 2,048 rows are 32 tiles or more, so two parts of K = 4,096 fill 132 "
        "multiprocessors, and more would only add planes; blocks of 128 columns take 254 registers",
    ),
)
INTERPRETED = Choice(
    0,
    16,
    0,
    0,
    Shape(block_n=32, block_k=32, split_k=64, num_warps=1, num_stages=1, programs=1),
    "for tests: several blocks and parts at the widths of a tiny model",
)
# Parts of K are at most so many: the last one to arrive reads a plane of each.
MAX_SPLITS = 16


def tile_rows(num_rows: int) -> int:
    """Return how many rows the tiles of a step with `num_rows` have at most."""
    return 16 if num_rows <= DECODE_ROWS else 64


def choice_of(spec: SiteSpec, tile_rows: int, capability: int) -> Choice:
    """Return the row of the table for a site, on a device of this capability.

    Semantics:
        capability: major * 10 + minor; 0 is the interpreter. Devices older than sm_80 take what
        sm_80 takes.
    """
    if not capability:
        return INTERPRETED
    for choice in TABLE:
        if (
            max(capability, 80) >= choice.capability
            and tile_rows <= choice.tile_rows
            and spec.out_features >= choice.min_columns
            and spec.in_features >= choice.min_features
        ):
            return choice
    msg = f"no block shapes for tiles of {tile_rows} rows; the table has up to 64"
    raise AssertionError(msg)


def even_split(in_features: int, block_k: int, goal: int) -> int:
    """Return how many columns of x a shrink item reads: near `goal`, and whole blocks if possible.

    Parts of equal size that are whole blocks need no masks along K. Where no number of parts up to
    MAX_SPLITS gives them, it is the goal itself, or more to stay within MAX_SPLITS.
    """
    least = -(-in_features // goal)
    for parts in range(min(least, MAX_SPLITS), MAX_SPLITS + 1):
        if in_features % (parts * block_k) == 0:
            return in_features // parts
    return max(goal, -(-in_features // (MAX_SPLITS * block_k)) * block_k)


def shape_of(spec: SiteSpec, tile_rows: int, device: torch.device) -> Shape:
    """Return the block shapes of a site, for tiles of so many rows."""
    return shape_for(spec, tile_rows, _capability(device))


def shape_for(spec: SiteSpec, tile_rows: int, capability: int) -> Shape:
    """Return the same for a device that need not be there."""
    shape = choice_of(spec, tile_rows, capability).shape
    split_k = even_split(spec.in_features, shape.block_k, shape.split_k)
    return shape._replace(split_k=split_k)


def programs(shape: Shape, device: torch.device) -> int:
    """Return how many programs draw tickets."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return _multiprocessors(device) * shape.programs


@cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

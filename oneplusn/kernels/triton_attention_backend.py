"""Attention over the paged KV cache on a GPU: what the Triton kernels are launched with.

A step takes one launch for the rows that it writes, two for its decode rows, one for all other
rows. Nothing is read back from the device, and grids follow from the sizes of the batch alone: a
CUDA graph of decode rows serves any contexts. On the CPU the kernels run in Triton's interpreter,
for tests.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from oneplusn.kernels.triton_attention import prefill_kernel, write_kernel
from oneplusn.kernels.triton_attention_decode import decode_kernel, merge_kernel

if TYPE_CHECKING:
    from oneplusn.kernels.cpu_attention import AttentionMeta

Phase = Literal["decode", "prefill"]
MAX_SPLITS = 32
"""Parts of a context at most; `merge_kernel` holds all of them at once."""


class Shape(NamedTuple):
    """Block shapes of one phase.

    Attributes:
        rows: Pairs of row and query head of a tile; more where a KV group has more heads.
        columns: Cached tokens that one turn of the loop reads.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline. Looking a block up takes two of its stages.
        split: Tokens of the shortest split of a decode row, a multiple of `columns`.
        programs: Programs per multiprocessor that share the splits of all decode rows.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    split: int = 256
    programs: int = 3


class Choice(NamedTuple):
    """A row of the table.

    Attributes:
        phase: Of the step.
        capability: Least compute capability, as major * 10 + minor.
        itemsize: Bytes of an element.
        dim: Largest padded size of a key or a value.
        shape: What to use.
        reason: The figure or the estimate that chose it.
    """

    phase: Phase
    capability: int
    itemsize: int
    dim: int
    shape: Shape
    reason: str


_STREAM = "estimate: two turns of 16 KB ahead in each of three blocks keep the memory busy; up to "
# Read from the top; the first row that fits decides. None was measured on a GPU yet. Registers are
# the most that any window, softcap, sinks and group took on sm_80 and sm_90.
TABLE = (
    Choice("decode", 80, 2, 64, Shape(16, 64, 4, 5), f"{_STREAM}128 registers"),
    Choice("decode", 80, 2, 128, Shape(16, 32, 4, 5), f"{_STREAM}164 registers"),
    Choice("decode", 80, 2, 256, Shape(16, 16, 4, 5), f"{_STREAM}168 registers"),
    Choice("decode", 80, 4, 256, Shape(16, 16, 4, 2), "no matrix units for fp32; 150 registers"),
    Choice("prefill", 80, 2, 64, Shape(128, 64, 8, 3), "estimate: 183 registers"),
    Choice("prefill", 90, 2, 128, Shape(128, 64, 8, 3), "estimate: 64 rows a warp group, 205"),
    Choice("prefill", 80, 2, 128, Shape(64, 64, 8, 3), "128 rows spill on sm_80, 64 take 255"),
    Choice("prefill", 80, 2, 256, Shape(64, 32, 8, 2), "64 columns spill on sm_80, 32 take 255"),
    Choice("prefill", 80, 4, 128, Shape(32, 32, 4, 2), "no matrix units for fp32; 168 registers"),
    Choice("prefill", 80, 4, 256, Shape(16, 16, 4, 2), "no matrix units for fp32; 128 registers"),
)
INTERPRETED = Shape(rows=16, columns=16, num_warps=1, num_stages=1, split=32)
"""For tests: several turns and splits at the lengths of a tiny model."""


@cache
def shape_for(phase: Phase, capability: int, dims: tuple[int, int], itemsize: int) -> Shape:
    """Return the block shapes for keys and values of these sizes on a device.

    Semantics:
        capability: major * 10 + minor; 0 is the interpreter. Devices older than sm_80 take what
        sm_80 takes.
    """
    if not capability:
        return INTERPRETED
    for choice in TABLE:
        if (
            choice.phase == phase
            and max(capability, 80) >= choice.capability
            and itemsize == choice.itemsize
            and max(map(_padded, dims)) <= choice.dim
        ):
            return choice.shape
    msg = f"no block shapes for heads of {dims} of {itemsize} bytes; the table has up to 256"
    raise AssertionError(msg)


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, kv_pos: Tensor) -> None:
    """Put this step's keys and values where `kv_pos` says, in one launch.

    Semantics:
        As `cpu_attention.write_kv`; a negative place is that of a row of padding, and is not
        written.
    """
    if not len(k):
        return
    heads, k_dim, v_dim = k_cache.shape[1], k_cache.shape[2], v_cache.shape[2]
    assert k.stride(2) == v.stride(2) == 1, "columns must lie side by side"
    write_kernel[(len(k),)](
        k, v, k_cache, v_cache, kv_pos,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        _head_stride(k_cache), _head_stride(v_cache),
        HEADS=heads, KD=k_dim, VD=v_dim, LARGEST=torch.finfo(k.dtype).max,
        HP=_power_of_two(heads), DP=_padded(k_dim), VP=_padded(v_dim),
    )  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    programs: int | None = None,
) -> Tensor:
    """Attend from this step's rows to their sequences' cached tokens.

    Semantics:
        As `cpu_attention.paged_attention`. Weights round to the dtype of the values before they
        meet them; sums are fp32. Decode rows have the same bits in any batch; so have other rows,
        in any batch and any chunk. A decode row whose context is empty, as rows of padding have
        it, is zero.

    Args:
        q: `[T, H, D]`, the columns side by side.
        k_cache: As `cpu_attention.new_cache` makes it, as `v_cache`.
        v_cache: Values.
        meta: The step, in the memory of the device.
        scale: Of the scores.
        window: Sliding window in tokens; None = the whole context.
        softcap: Bound of the scores; None = none.
        sinks: `[H]`, any float dtype.
        programs: How many share the splits of the decode rows; by default as many as fit.

    Returns:
        y `[T, H, Dv]`, contiguous.
    """
    launch = _Launch(q, k_cache, v_cache, meta, sinks)
    constants = {"SCALE": scale, "WINDOW": window, "SOFTCAP": softcap}
    y = q.new_empty(len(q), q.shape[1], v_cache.shape[2])
    if meta.num_decodes:
        launch.decode(y, constants, programs)
    if len(q) > meta.num_decodes:
        launch.prefill(y, constants)
    return y


class _Launch:
    """One call: its tensors, and what its launches have in common."""

    def __init__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, sinks: Tensor | None
    ) -> None:
        heads, k_dim, v_dim = k_cache.shape[1], k_cache.shape[2], v_cache.shape[2]
        assert q.stride(2) == 1, "columns must lie side by side"
        assert meta.block_tables.stride(1) == 1, "blocks of a sequence must lie side by side"
        self._tensors = q, k_cache, v_cache
        self._meta = meta
        self._sinks = sinks
        self._dims = k_dim, v_dim
        self._heads, self._group = heads, q.shape[1] // heads
        self._strides = *q.stride()[:2], _head_stride(k_cache), _head_stride(v_cache)

    def decode(self, y: Tensor, constants: dict[str, Any], programs: int | None) -> None:
        """Attend from the decode rows, the first rows of `y`."""
        meta, q = self._meta, self._tensors[0]
        num_seqs, heads, v_dim = meta.num_decodes, y.shape[1], self._dims[1]
        shape = self._shape("decode")
        parts = q.new_empty(num_seqs, MAX_SPLITS, heads, v_dim, dtype=torch.float32)
        weights = q.new_empty(num_seqs, MAX_SPLITS, heads, dtype=torch.float32)
        splits = {"SPLIT": shape.split, "MAX_SPLITS": MAX_SPLITS}
        programs = programs or _device(q.device).multiprocessors * shape.programs
        decode_kernel[(min(programs, num_seqs * MAX_SPLITS * self._heads),)](
            *self._tensors, parts, weights, meta.block_tables, meta.context_lens,
            num_seqs, meta.block_tables.stride(0), *self._strides,
            **self._sizes(shape), **constants, **splits,
        )  # fmt: skip
        merge_kernel[(num_seqs, heads)](
            parts, weights, y, y if self._sinks is None else self._sinks, meta.context_lens,
            SINKS=self._sinks is not None, WINDOW=constants["WINDOW"],
            VD=v_dim, VP=_padded(v_dim), **splits, num_warps=merge_warps(v_dim),
        )  # fmt: skip

    def prefill(self, y: Tensor, constants: dict[str, Any]) -> None:
        """Attend from all other rows."""
        meta = self._meta
        num_seqs, sizes = len(meta.context_lens), self._sizes(self._shape("prefill"))
        num_rows, num_chunks = len(y) - meta.num_decodes, num_seqs - meta.num_decodes
        num_tiles = num_rows // (sizes["BM"] // self._group) + num_chunks
        prefill_kernel[(num_tiles, self._heads)](
            *self._tensors, y, y if self._sinks is None else self._sinks,
            meta.block_tables, meta.query_start, meta.context_lens,
            meta.num_decodes, num_seqs, meta.block_tables.stride(0), *self._strides,
            SINKS=self._sinks is not None, **sizes, **constants,
        )  # fmt: skip

    def _shape(self, phase: Phase) -> Shape:
        q = self._tensors[0]
        return shape_for(phase, _device(q.device).capability, self._dims, q.itemsize)

    def _sizes(self, shape: Shape) -> dict[str, int]:
        sizes = sizes_of(shape, self._heads, self._group, self._dims)
        options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
        return {**sizes, "BLOCK": self._meta.block_size, **options}


def sizes_of(shape: Shape, heads: int, group: int, dims: tuple[int, int]) -> dict[str, int]:
    """Return the sizes that decode and prefill are compiled for.

    Args:
        shape: Block shapes.
        heads: KV heads.
        group: Query heads of each.
        dims: Sizes D of a key and Dv of a value.
    """
    k_dim, v_dim = dims
    return {
        "HEADS": heads, "GROUP": group,
        "KD": k_dim, "VD": v_dim, "DP": _padded(k_dim), "VP": _padded(v_dim),
        # All heads of a group are in one tile.
        "BM": max(shape.rows, _power_of_two(group)), "BN": shape.columns,
    }  # fmt: skip


def merge_warps(v_dim: int) -> int:
    """Return the warps of a program that holds all splits of one row: 64 registers of them."""
    return 8 if v_dim > 128 else 4


def _head_stride(cache: Tensor) -> int:
    assert cache.stride(2) == 1, cache.stride()
    assert cache.stride(0) == cache.shape[2], "the rows of a head must lie side by side"
    return cache.stride(1)


def _padded(dim: int) -> int:
    # The least that is multiplied at once.
    return max(16, _power_of_two(dim))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class _Device(NamedTuple):
    capability: int
    multiprocessors: int


@cache
def _device(device: torch.device) -> _Device:
    if device.type != "cuda":
        return _Device(0, 1)
    found = torch.cuda.get_device_properties(device)
    return _Device(found.major * 10 + found.minor, found.multi_processor_count)

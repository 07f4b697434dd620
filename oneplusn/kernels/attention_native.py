"""Attention and writes to the KV cache by the compiled kernels of the CPU."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from oneplusn.kernels import native, ops

if TYPE_CHECKING:
    from oneplusn.kernels.cpu_attention import AttentionMeta

DTYPES = (torch.bfloat16, torch.float32)


class AttentionArguments(ctypes.Structure):
    """`Attention` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "sequences", "lengths", "sinks")),
        *(
            (name, ctypes.c_int64)
            for name in ("q_row_stride", "q_head_stride", "tokens", "table_stride")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("rows", "kv_heads", "group", "k_dim", "v_dim", "block_size", "window")
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


class Scores(NamedTuple):
    """How scores become weights: as the parameters of `cpu_attention.paged_attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def takes(dtype: torch.dtype) -> bool:
    """Tell whether there are compiled kernels for this dtype."""
    return dtype in DTYPES and ops.compiled()


def write(cache: Tensor, source: Tensor, places: Tensor) -> None:
    """Write rows into a cache; what is not finite becomes 0 or the largest number.

    Semantics:
        cache[places[t]] = source[t]; cache `[tokens, Hkv, D]` head-major, source `[T, Hkv, D]`
        strided with columns side by side, places int64 `[T]`.
    """
    tokens, heads, dim = cache.shape
    assert source.stride(2) == 1, source.stride()
    assert places.is_contiguous(), places.stride()
    native.required().oneplusn_write_cache(
        cache.data_ptr(),
        source.data_ptr(),
        places.data_ptr(),
        cache.dtype == torch.bfloat16,
        len(source),
        heads,
        dim,
        tokens,
        source.stride(0),
        source.stride(1),
    )


def attend(
    y: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scores: Scores
) -> None:
    """Attend from all rows of the step; see `cpu_attention.paged_attention`.

    Writes y `[T, H, Dv]`. Weights stay fp32; a row's bits depend on its own context alone.
    """
    tokens, heads, k_dim = k_cache.shape
    assert q.stride(2) == 1, q.stride()
    assert meta.block_tables.is_contiguous(), meta.block_tables.stride()
    assert y.is_contiguous(), y.stride()
    sinks = None if scores.sinks is None else scores.sinks.float().contiguous()
    arguments = AttentionArguments(
        q=q.data_ptr(),
        k=k_cache.data_ptr(),
        v=v_cache.data_ptr(),
        out=y.data_ptr(),
        block_tables=meta.block_tables.data_ptr(),
        sequences=meta.sequences.data_ptr(),
        lengths=meta.lengths.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        tokens=tokens,
        table_stride=meta.block_tables.stride(0),
        rows=len(q),
        kv_heads=heads,
        group=q.shape[1] // heads,
        k_dim=k_dim,
        v_dim=v_cache.shape[2],
        block_size=meta.block_size,
        window=scores.window or 0,
        scale=scores.scale,
        softcap=scores.softcap or 0.0,
    )
    native.required().oneplusn_attention(
        ctypes.byref(arguments), q.dtype == torch.bfloat16, native.threads()
    )

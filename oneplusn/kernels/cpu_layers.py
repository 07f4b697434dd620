"""Decoder layers of Llama's shape on the CPU, compiled: all layers of a step in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneplusn.kernels import native
from oneplusn.kernels.cpu_linear import LinearArguments, Panels
from oneplusn.kernels.plan import Plan, Site

if TYPE_CHECKING:
    from oneplusn.kernels.cpu_attention import AttentionMeta

LINEARS = ("qkv", "o", "gate_up", "down")
"""The linears of a layer, in the order in which they are used."""
NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")
PARTS = ("linears", "deltas", "attention", "others")
"""What the time of a call is told apart by."""


class LayerArguments(ctypes.Structure):
    """`Layer` of the source."""

    _fields_ = (
        *((name, LinearArguments) for name in LINEARS),
        *((f"{name}_site", ctypes.c_void_p) for name in LINEARS),
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, ctypes.c_void_p) for name in ("k_cache", "v_cache")),
        ("window", ctypes.c_int64),
    )


class ShapeArguments(ctypes.Structure):
    """`Shape` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "inner", "q_heads", "kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("tokens", "block_size")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class BatchArguments(ctypes.Structure):
    """`Batch` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("places", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "sequences", "lengths")),
        *((name, ctypes.c_void_p) for name in ("step", "seconds")),
        *((name, ctypes.c_int64) for name in ("rows", "table_stride")),
    )


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """What one layer is made of.

    Attributes:
        linears: Those of LINEARS; q, k and v side by side in the first, gate and up in the third.
        sites: Where adapters reach each; None where none can.
        norms: Weights of NORMS; the last two are None in families that do not have them.
        k_cache: `[tokens, Hkv, D]`, head-major.
        v_cache: The same for values.
        window: Sliding window in tokens; None = the whole context.
    """

    linears: Sequence[Panels]
    sites: Sequence[Site | None]
    norms: Sequence[Tensor | None]
    k_cache: Tensor
    v_cache: Tensor
    window: int | None


class Layers:
    """All layers of a model, bound to a KV cache and to the sites of a pool.

    Attributes:
        seconds: Where the time of the calls goes, added up over PARTS; None = not measured.
    """

    def __init__(
        self, parts: Sequence[LayerParts], heads: tuple[int, int], eps: float, scale: float
    ) -> None:
        """Look up every address.

        Args:
            parts: Of each layer, in their order.
            heads: Query heads H and KV heads Hkv.
            eps: Of the norms.
            scale: Of the scores.
        """
        self.seconds: ctypes.Array[ctypes.c_double] | None = None
        self._parts = tuple(parts)
        qkv, _, gate_up, _ = parts[0].linears
        tokens, _, dim = parts[0].k_cache.shape
        self._dtype = qkv.dtype
        self._layers = (LayerArguments * len(parts))(*map(_layer_arguments, parts))
        self._shape = ShapeArguments(
            hidden=qkv.width,
            inner=gate_up.columns // 2,
            q_heads=heads[0],
            kv_heads=heads[1],
            dim=dim,
            tokens=tokens,
            eps=eps,
            scale=scale,
        )

    def run(self, h: Tensor, cos: Tensor, sin: Tensor, meta: AttentionMeta, plan: Plan) -> None:
        """Take the rows of a step through all layers, in place.

        Semantics:
            Per layer, with x = norm h / sqrt(mean(h^2) + eps) and the deltas of the plan's rows:
            h += o(attend(rotate(qkv(x)))); then h += down(silu(gate(x)) up(x))
            h `[T, K]`, cos and sin `[T, D]`, of the weights' dtype. Rounds where the modules of
            transformers round, except the rotation, which rounds once.
        """
        assert h.dtype == cos.dtype == sin.dtype == self._dtype, (h.dtype, cos.dtype, self._dtype)
        tensors = (h, cos, sin, meta.kv_pos, meta.block_tables, meta.sequences, meta.lengths)
        assert all(tensor.is_contiguous() for tensor in tensors)
        self._shape.block_size = meta.block_size
        site = next((site for part in self._parts for site in part.sites if site), None)
        adapted = site is not None and not plan.empty
        step = site.arguments.step(plan) if adapted and site is not None else None
        batch = BatchArguments(
            places=meta.kv_pos.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            block_tables=meta.block_tables.data_ptr(),
            sequences=meta.sequences.data_ptr(),
            lengths=meta.lengths.data_ptr(),
            step=None if step is None else ctypes.addressof(step),
            seconds=None if self.seconds is None else ctypes.addressof(self.seconds),
            rows=len(h),
            table_stride=meta.block_tables.stride(0),
        )
        native.required().oneplusn_layers(
            self._layers,
            len(self._parts),
            ctypes.byref(self._shape),
            ctypes.byref(batch),
            self._dtype == torch.bfloat16,
            h.data_ptr(),
            native.threads(),
        )


def _layer_arguments(parts: LayerParts) -> LayerArguments:
    sites = [None if s is None else ctypes.addressof(s.arguments.site(s)) for s in parts.sites]
    return LayerArguments(
        *(panels.arguments for panels in parts.linears),
        *sites,
        *(None if norm is None else norm.data_ptr() for norm in parts.norms),
        parts.k_cache.data_ptr(),
        parts.v_cache.data_ptr(),
        parts.window or 0,
    )

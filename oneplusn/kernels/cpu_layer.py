"""What lies between the matrix products of a decoder layer, compiled: norms, rotation, activation.

Every function takes bf16 or fp32 rows that lie one after another, and rounds where the modules of
transformers do. They need `native.loaded()`; the modules themselves are the way without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oneplusn.kernels import native


def rms_norm(h: Tensor, weight: Tensor, eps: float, *, added: Tensor | None = None) -> Tensor:
    """Normalise rows; before that add to them in place.

    Semantics:
        h[t] += added[t]; y[t] = weight * h[t] / sqrt(mean(h[t]^2) + eps)
        h, added `[T, K]`, weight `[K]`; sums in fp32, the quotient rounds before the weight.
    """
    assert h.is_contiguous(), h.stride()
    assert added is None or added.is_contiguous(), "rows lie one after another"
    y = torch.empty_like(h)
    rows, width = h.shape
    native.required().oneplusn_rms_norm(
        h.data_ptr(),
        None if added is None else added.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        h.dtype == torch.bfloat16,
        rows,
        width,
        eps,
        torch.get_num_threads(),
    )
    return y


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: tuple[int, int],
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate the queries and keys at the start of every row, in place.

    Semantics:
        per head z [D] of row t, its halves z1, z2: first z = norm * z / rms(z), if there are
        norms; then (z1 cos - z2 sin, z2 cos + z1 sin), in fp32, rounded once.
        x `[T, (H + Hkv) D + ..]`, cos and sin `[T, D]` of x's dtype; norms `[D]` for H and Hkv.
    """
    assert x.stride(1) == 1, x.stride()
    assert cos.is_contiguous(), cos.stride()
    assert sin.is_contiguous(), sin.stride()
    q_norm, k_norm = (None, None) if norms is None else (w.data_ptr() for w in norms)
    native.required().oneplusn_rotate(
        x.data_ptr(),
        x.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        q_norm,
        k_norm,
        x.dtype == torch.bfloat16,
        len(x),
        *heads,
        cos.shape[1],
        eps,
        torch.get_num_threads(),
    )


def silu_mul(x: Tensor) -> Tensor:
    """Gate the second half of every row with the first.

    Semantics:
        y[t] = silu(x[t, :F]) * x[t, F:], x `[T, 2 F]` -> y `[T, F]`
    """
    assert x.is_contiguous()
    rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, width)
    native.required().oneplusn_silu_mul(
        x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, rows, width, torch.get_num_threads()
    )
    return y

"""The specification of paged attention: row by row in fp64, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from oneplusn.kernels.cpu_attention import AttentionMeta


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, kv_pos: Tensor) -> None:
    """Put this step's keys and values where `kv_pos` says.

    Semantics:
        k_cache[kv_pos[t]] = k[t]; v_cache[kv_pos[t]] = v[t], where kv_pos[t] is not negative.
        k_cache [blocks * block_size, Hkv, D], v_cache [blocks * block_size, Hkv, Dv], in place;
        k [T, Hkv, D], v [T, Hkv, Dv] of the caches' dtype; kv_pos int64 [T], distinct. What is not
        finite is stored as a finite value.
    """
    rows = kv_pos >= 0
    k_cache[kv_pos[rows]] = torch.nan_to_num(k[rows])
    v_cache[kv_pos[rows]] = torch.nan_to_num(v[rows])


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
) -> Tensor:
    """Attend from this step's rows to their sequences' cached tokens.

    Semantics:
        For row t of sequence b at position p, head h of KV group g, over positions j of b with
        p - window < j <= p:
            s_j = scale * (q[t, h] . k_j[g]);  s_j = softcap * tanh(s_j / softcap)
            y[t, h] = sum_j exp(s_j) v_j[g] / (sum_j exp(s_j) + exp(sinks[h]))
        The last row of b stands at its length - 1; a row before the first token is zero.
        q [T, H, D]; k_cache [blocks * block_size, Hkv, D], v_cache [.., Hkv, Dv]; sinks [H]; all
        of one float dtype or another, summed in fp64 and rounded once.

    Returns:
        y [T, H, Dv], contiguous.
    """
    y = q.new_zeros(len(q), q.shape[1], v_cache.shape[2])
    group = q.shape[1] // k_cache.shape[1]
    for seq, length in enumerate(meta.context_lens.tolist()):
        first, stop = meta.query_start[seq : seq + 2].tolist()
        for row in range(first, stop):
            position = length - (stop - row)
            if position < 0:
                continue
            oldest = 0 if window is None else max(0, position - window + 1)
            j = torch.arange(oldest, position + 1, device=q.device)
            block, offset = meta.block_tables[seq, j // meta.block_size], j % meta.block_size
            places = block.long() * meta.block_size + offset
            ks = k_cache[places].double().repeat_interleave(group, 1)
            vs = v_cache[places].double().repeat_interleave(group, 1)
            scores = scale * torch.einsum("hd,lhd->hl", q[row].double(), ks)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None]), 1)
            weights = torch.softmax(scores, 1)[:, : len(j)]
            y[row] = torch.einsum("hl,lhd->hd", weights, vs).to(y.dtype)
    return y

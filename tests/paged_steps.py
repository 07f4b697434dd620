"""Steps over a paged cache in which everything that no row may see is NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oneplusn.kernels.cpu_attention import AttentionMeta, new_cache

BLOCK = 16


@dataclass(frozen=True)
class Heads:
    """H query heads over Hkv groups, sizes D of keys and Dv of values."""

    heads: int = 4
    kv_heads: int = 2
    k_dim: int = 8
    v_dim: int = 8


@dataclass(frozen=True)
class Context:
    """One sequence: keys and values of all its tokens, queries of the last ones."""

    q: Tensor
    k: Tensor
    v: Tensor

    def last(self, rows: int, length: int) -> Context:
        """The same sequence when its last row stood at `length` - 1."""
        return Context(self.q[length - rows : length], self.k[:length], self.v[:length])


def draw(
    sizes: Sequence[tuple[int, int]],
    heads: Heads,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Context]:
    """Draw sequences of (rows in this step, context with them)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        Context(
            random(rows, heads.heads, heads.k_dim),
            random(length, heads.kv_heads, heads.k_dim),
            random(length, heads.kv_heads, heads.v_dim),
        )
        for rows, length in sizes
    ]


@dataclass(frozen=True)
class Step:
    """Contexts laid out in shuffled blocks, decode rows first."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    meta: AttentionMeta

    def hide_what_windows_hide(self, window: int) -> Step:
        """Fill with NaN what lies before the window of every sequence's first row."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        rows = self.meta.query_start.diff()
        for table, length, count in zip(
            self.meta.block_tables, self.meta.context_lens, rows, strict=True
        ):
            j = torch.arange(max(0, int(length - count) - window + 1))
            places = table[j // BLOCK].long() * BLOCK + j % BLOCK
            k_cache[places] = v_cache[places] = math.nan
        return replace(self, k_cache=k_cache, v_cache=v_cache)


def lay_out(contexts: Sequence[Context], *, num_decodes: int | None = None, seed: int = 0) -> Step:
    """Lay sequences out; the last block of the cache is nobody's and full of NaN."""
    if num_decodes is None:
        several = (i for i, context in enumerate(contexts) if len(context.q) != 1)
        num_decodes = next(several, len(contexts))
    counts = [-(-len(context.k) // BLOCK) for context in contexts]
    num_blocks = sum(counts) + 2
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_blocks - 1, generator=generator).tolist()
    tokens, dtype = num_blocks * BLOCK, contexts[0].q.dtype
    k_cache, v_cache = (
        new_cache(tokens, part.shape[1], part.shape[2], dtype).fill_(math.nan)
        for part in (contexts[0].k, contexts[0].v)
    )
    tables = torch.full((len(counts), max(counts) + 1), num_blocks - 1, dtype=torch.int32)
    kv_pos = []
    for index, context in enumerate(contexts):
        blocks = torch.tensor([order.pop() for _ in range(counts[index])], dtype=torch.int32)
        tables[index, : len(blocks)] = blocks
        j = torch.arange(len(context.k))
        places = blocks[j // BLOCK].long() * BLOCK + j % BLOCK
        k_cache[places], v_cache[places] = context.k, context.v
        kv_pos.append(places[len(places) - len(context.q) :])
    rows = torch.tensor([0] + [len(context.q) for context in contexts])
    meta = AttentionMeta(
        kv_pos=torch.cat(kv_pos),
        query_start=rows.cumsum(0).int(),
        context_lens=torch.tensor([len(context.k) for context in contexts], dtype=torch.int32),
        block_tables=tables,
        block_size=BLOCK,
        num_decodes=num_decodes,
    )
    return Step(torch.cat([context.q for context in contexts]), k_cache, v_cache, meta)

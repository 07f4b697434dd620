"""Attention over the paged KV cache, on the CPU.

Layout: a cache is `[blocks * block_size, Hkv, D]` to its users and head-major in memory, so that
the rows of one block and one KV head are contiguous: a gather by block table then yields
`[Hkv, B, L, D]`, which is a batched matrix product's operand as it stands.

All rows go through a compiled kernel where there is one (`attention_native`). Without it decode
rows are computed together, the query heads of a KV group being the rows of one product.
With 16 sequences of 128 tokens, 9/3 heads of 64, bf16 and one thread this took 441 us a layer,
SDPA on the same gathered rows 616, SDPA sequence by sequence 882. Prefill rows go through SDPA
sequence by sequence, except where the model needs a softcap or sinks, which SDPA does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from oneplusn.kernels import attention_native
from oneplusn.kernels.buffers import zeros

# Decode rows share a product when their contexts are in one class: up to 256 tokens, up to 512,
# 1,024 … So a long context does not make every other row as long as itself.
SMALLEST_CLASS = 16  # blocks
# Rows of a prefill whose score matrix is held at once where SDPA is not used.
SCORE_ROWS = 128


@dataclass(frozen=True, eq=False)
class AttentionMeta:
    """Where the rows of a step stand in the KV cache: T rows, B sequences.

    Attributes:
        kv_pos: int64 [T], flat cache position of every row: block * block_size + offset.
        query_start: int32 [B + 1], first row of each sequence, then T.
        context_lens: int32 [B], tokens that the last row of each sees, itself included.
        block_tables: int32 [B, max_blocks]; entries past a sequence's end name any block.
        block_size: Tokens of a block.
        num_decodes: The first so many sequences have exactly one row each.
    """

    kv_pos: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    block_size: int
    num_decodes: int
    _groups: dict[_View, list[_DecodeGroup]] = field(default_factory=dict, init=False, repr=False)
    _chunks: dict[_View, list[_Chunk]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def sequences(self) -> Tensor:
        """The sequence of every row, int32 [T]."""
        counts = self.query_start.diff()
        return torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), counts)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens that every row sees, itself included: int32 [T]."""
        after = self.context_lens - self.query_start[1:]
        rows = torch.arange(1, len(self.sequences) + 1, dtype=torch.int32)
        return rows + after[self.sequences]

    def decode_groups(self, view: _View) -> list[_DecodeGroup]:
        """Group the decode rows by length of context; made once for all layers of one view."""
        groups = self._groups.get(view)
        if groups is None:
            groups = self._groups[view] = _decode_groups(self, view)
        return groups

    def chunks(self, view: _View) -> list[_Chunk]:
        """List the sequences that are no decode rows; made once for all layers of one view."""
        chunks = self._chunks.get(view)
        if chunks is None:
            chunks = self._chunks[view] = _chunks(self, view)
        return chunks


@dataclass(frozen=True, slots=True)
class _View:
    """What of a layer decides which cache rows it reads: its window and its cache's shape."""

    window: int | None
    heads: int
    blocks: int


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows that are computed in one product.

    Attributes:
        rows: int64 [B], which rows of the batch; None = the first `size`.
        size: How many.
        gather: [Hkv * B * blocks], block rows of the head-major cache.
        hidden: bool [B, 1, L], columns outside the context or the window.
    """

    rows: Tensor | None
    size: int
    gather: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive rows of one sequence.

    Attributes:
        start: First row in the batch.
        stop: Row after the last.
        gather: [Hkv * blocks], block rows of the head-major cache.
        length: Gathered tokens that count; the last of them is the last row's own.
        visible: bool [rows, L]; None = plainly causal, rows = L.
    """

    start: int
    stop: int
    gather: Tensor
    length: int
    visible: Tensor | None


def new_cache(
    num_tokens: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Allocate a cache of zeros, `[num_tokens, heads, dim]`, head-major in memory."""
    return zeros((heads, num_tokens, dim), dtype, device, in_large_pages=True).transpose(0, 1)


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, kv_pos: Tensor) -> None:
    """Put this step's keys and values where `kv_pos` says.

    What is not finite is stored as a finite value: a column that is masked still meets its value
    as 0 * v, so one broken request would otherwise reach whoever uses the block next.

    Semantics:
        k_cache[kv_pos[t]] = k[t]; v_cache[kv_pos[t]] = v[t]
        k_cache [blocks * block_size, Hkv, D], v_cache [blocks * block_size, Hkv, Dv], in place;
        k [T, Hkv, D], v [T, Hkv, Dv] of the caches' dtype, strided; kv_pos int64 [T], distinct.
    """
    if attention_native.takes(k.dtype):
        attention_native.write(k_cache, k, kv_pos)
        attention_native.write(v_cache, v, kv_pos)
    else:
        k_cache[kv_pos] = torch.nan_to_num(k)
        v_cache[kv_pos] = torch.nan_to_num(v)


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
        q [T, H, D], strided; k_cache [blocks * block_size, Hkv, D] and v_cache [.., Hkv, Dv] as
        `new_cache` makes them, of q's dtype; sinks [H]. Scores and sums in fp32.

    Returns:
        y [T, H, Dv], contiguous.
    """
    heads, v_dim = k_cache.shape[1], v_cache.shape[2]
    y = q.new_empty(q.shape[0], q.shape[1], v_dim)
    if attention_native.takes(q.dtype):
        scores = attention_native.Scores(scale, window, softcap, sinks)
        attention_native.attend(y, q, k_cache, v_cache, meta, scores)
        return y
    k_blocks, v_blocks = _by_block(k_cache, meta.block_size), _by_block(v_cache, meta.block_size)
    view = _View(window, heads, k_blocks.shape[0] // heads)
    if sinks is not None:
        sinks = sinks.float().view(heads, -1)
    for group in meta.decode_groups(view) if meta.num_decodes else ():
        k = k_blocks.index_select(0, group.gather).view(heads * group.size, -1, q.shape[2])
        v = v_blocks.index_select(0, group.gather).view(heads * group.size, -1, v_dim)
        rows = q[: group.size] if group.rows is None else q.index_select(0, group.rows)
        out = _decode(rows, k, v, group.hidden, scale, softcap, sinks)
        if group.rows is None:
            y[: group.size] = out
        else:
            y.index_copy_(0, group.rows, out)
    for chunk in meta.chunks(view):
        k = k_blocks.index_select(0, chunk.gather).view(heads, -1, q.shape[2])[:, : chunk.length]
        v = v_blocks.index_select(0, chunk.gather).view(heads, -1, v_dim)[:, : chunk.length]
        rows = q[chunk.start : chunk.stop]
        out = y[chunk.start : chunk.stop]
        if softcap is None and sinks is None:
            _prefill_sdpa(out, rows, k, v, chunk.visible, scale)
        else:
            _prefill(out, rows, k, v, chunk.visible, scale, softcap, sinks)
    return y


def _by_block(cache: Tensor, block_size: int) -> Tensor:
    """View a cache as rows of one block and one KV head: [Hkv * blocks, block_size * D]."""
    tokens, heads, dim = cache.shape
    return cache.transpose(0, 1).view(heads * (tokens // block_size), block_size * dim)


def _softmax(
    scores: Tensor, hidden: Tensor | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Turn fp32 scores [.., L] into weights, in place where it can; sinks broadcast to [.., 1]."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        # Filled, not added to: a stale key may have made the score infinite.
        scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1)
    column = sinks.expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend from one row each of B sequences.

    Semantics:
        q [B, H, D]; k [Hkv * B, L, D], v [Hkv * B, L, Dv]; hidden [B, 1, L]; sinks [Hkv, H / Hkv].

    Returns:
        [B, H, Dv]
    """
    size, num_heads, dim = q.shape
    heads = k.shape[0] // size
    by_head = q.reshape(size, heads, -1, dim).transpose(0, 1).reshape(heads * size, -1, dim)
    scores = torch.bmm(by_head, k.transpose(1, 2)).float().mul_(scale)
    if sinks is not None:
        sinks = sinks.view(heads, 1, -1, 1)
    weights = _softmax(scores.view(heads, size, -1, k.shape[1]), hidden, softcap, sinks)
    out = torch.bmm(weights.to(v.dtype).reshape(heads * size, -1, k.shape[1]), v)
    return out.view(heads, size, -1, v.shape[2]).transpose(0, 1).reshape(size, num_heads, -1)


def _prefill_sdpa(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float
) -> None:
    """Attend from the rows of one sequence: out [T, H, Dv], q [T, H, D], k and v [Hkv, L, ..]."""
    heads = k.shape[0]
    by_head = q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
    group = by_head.shape[1]
    attended = scaled_dot_product_attention(
        by_head,
        k[:, None].expand(-1, group, -1, -1),
        v[:, None].expand(-1, group, -1, -1),
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
    )
    out.unflatten(1, (heads, group)).copy_(attended.permute(2, 0, 1, 3))


def _prefill(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Attend as `_prefill_sdpa`, with softcap and sinks [Hkv, H / Hkv]."""
    heads, length = k.shape[:2]
    if visible is None:
        visible = torch.ones(q.shape[0], length, dtype=torch.bool).tril_()
    if sinks is not None:
        sinks = sinks.view(heads, -1, 1, 1)
    for start in range(0, q.shape[0], SCORE_ROWS):
        rows = q[start : start + SCORE_ROWS].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        folded = rows.reshape(heads, -1, q.shape[2])
        scores = torch.bmm(folded, k.transpose(1, 2)).float().mul_(scale)
        hidden = ~visible[start : start + SCORE_ROWS]
        weights = _softmax(scores.view(*rows.shape[:3], length), hidden, softcap, sinks)
        attended = torch.bmm(weights.to(v.dtype).reshape(heads, -1, length), v)
        attended = attended.view(*rows.shape[:3], -1).permute(2, 0, 1, 3)
        out[start : start + SCORE_ROWS].unflatten(1, rows.shape[:2]).copy_(attended)


def _decode_groups(meta: AttentionMeta, view: _View) -> list[_DecodeGroup]:
    """Put the decode rows in classes by the number of blocks that they read."""
    size = meta.block_size
    lens = meta.context_lens[: meta.num_decodes].long()
    oldest = torch.zeros_like(lens) if view.window is None else (lens - view.window).clamp_(min=0)
    first = oldest // size
    num_blocks = (lens + size - 1) // size - first
    classes = [(max(count, SMALLEST_CLASS) - 1).bit_length() for count in num_blocks.tolist()]
    groups = []
    for each in sorted(set(classes)):
        rows = torch.tensor([row for row, its in enumerate(classes) if its == each])
        columns = first[rows, None] + torch.arange(int(num_blocks[rows].max()))
        inside = columns.clamp(max=meta.block_tables.shape[1] - 1)
        positions = (columns[:, :, None] * size + torch.arange(size)).flatten(1)
        hidden = (positions >= lens[rows, None]) | (positions < oldest[rows, None])
        groups.append(
            _DecodeGroup(
                rows=None if len(rows) == meta.num_decodes else rows,
                size=len(rows),
                gather=_gather_index(meta.block_tables[rows].gather(1, inside), view),
                hidden=hidden[:, None],
            )
        )
    return groups


def _chunks(meta: AttentionMeta, view: _View) -> list[_Chunk]:
    """Describe the rows and the context of every sequence that is no decode row."""
    starts, lens, size = meta.query_start.tolist(), meta.context_lens.tolist(), meta.block_size
    chunks = []
    for index in range(meta.num_decodes, len(lens)):
        start, stop, length = starts[index], starts[index + 1], lens[index]
        first_row = length - (stop - start)
        oldest = 0 if view.window is None else max(0, first_row + 1 - view.window)
        first = oldest // size
        blocks = meta.block_tables[index, first : -(-length // size)]
        visible = None
        if first_row > 0 or (view.window is not None and length > view.window):
            rows = torch.arange(first_row, length)[:, None]
            columns = torch.arange(first * size, length)
            visible = columns <= rows
            if view.window is not None:
                visible &= columns > rows - view.window
        chunks.append(
            _Chunk(start, stop, _gather_index(blocks, view), length - first * size, visible)
        )
    return chunks


def _gather_index(blocks: Tensor, view: _View) -> Tensor:
    """Name the rows of the head-major cache that hold `blocks`: int32, head by head."""
    offsets = torch.arange(view.heads, dtype=torch.int32) * view.blocks
    return (offsets[:, None] + blocks.int().flatten()).flatten()

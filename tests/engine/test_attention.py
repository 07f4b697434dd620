"""Paged attention gives what plain attention over each sequence alone gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oneplusn.kernels import attention_native
from oneplusn.kernels.cpu_attention import AttentionMeta, new_cache, paged_attention, write_kv
from tolerances import assert_close

BLOCK = 16


@pytest.fixture(params=[True, False], ids=["compiled", "torch"], autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Attend by the compiled kernel, or the way that does without."""
    if not request.param:
        monkeypatch.setattr(attention_native, "takes", lambda dtype: False)
    return request.param


@dataclass(frozen=True)
class Shape:
    """Heads H over Hkv groups, sizes D of keys and Dv of values."""

    heads: int = 6
    kv_heads: int = 2
    k_dim: int = 8
    v_dim: int = 8


@dataclass(frozen=True)
class Case:
    """Sequences as (rows in this step, context with them), decode rows first."""

    sequences: tuple[tuple[int, int], ...]
    shape: Shape
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def num_decodes(self) -> int:
        return next(
            (i for i, (rows, _) in enumerate(self.sequences) if rows > 1), len(self.sequences)
        )


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence: the last rows of its context attend; all in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("thd,lhd->htl", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(len(k) - len(q), len(k))[:, None]
    columns = torch.arange(len(k))
    visible = columns <= rows
    if window is not None:
        visible &= columns > rows - window
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1)[..., : len(k)]
    return torch.einsum("htl,lhd->thd", weights, v)


class Paged:
    """A case laid out in a cache of shuffled blocks, everything else in it poisoned."""

    def __init__(self, case: Case, poison: float = 1e30) -> None:
        shape = case.shape
        draw = torch.Generator().manual_seed(case.seed)
        counts = [-(-context // BLOCK) for _, context in case.sequences]
        num_blocks = sum(counts) + 3
        order = torch.randperm(num_blocks, generator=draw).tolist()
        self.k_cache = new_cache(num_blocks * BLOCK, shape.kv_heads, shape.k_dim, case.dtype)
        self.v_cache = new_cache(num_blocks * BLOCK, shape.kv_heads, shape.v_dim, case.dtype)
        self.k_cache.fill_(poison)
        self.v_cache.fill_(poison)
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        kv_pos = []
        for index, (rows, context) in enumerate(case.sequences):
            blocks = [order.pop() for _ in range(counts[index])]
            tables[index, : counts[index]] = torch.tensor(blocks)
            at = torch.tensor([blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(context)])
            k = torch.randn(context, shape.kv_heads, shape.k_dim, generator=draw).to(case.dtype)
            v = torch.randn(context, shape.kv_heads, shape.v_dim, generator=draw).to(case.dtype)
            q = torch.randn(rows, shape.heads, shape.k_dim, generator=draw).to(case.dtype)
            self.k_cache[at[:-rows]], self.v_cache[at[:-rows]] = k[:-rows], v[:-rows]
            kv_pos.append(at[-rows:])
            self.queries.append(q)
            self.keys.append(k)
            self.values.append(v)
        rows = torch.tensor([0] + [rows for rows, _ in case.sequences])
        self.meta = AttentionMeta(
            kv_pos=torch.cat(kv_pos),
            query_start=rows.cumsum(0).int(),
            context_lens=torch.tensor([context for _, context in case.sequences]).int(),
            block_tables=tables,
            block_size=BLOCK,
            num_decodes=case.num_decodes,
        )
        new_k = [k[-len(q) :] for k, q in zip(self.keys, self.queries, strict=True)]
        new_v = [v[-len(q) :] for v, q in zip(self.values, self.queries, strict=True)]
        write_kv(self.k_cache, self.v_cache, torch.cat(new_k), torch.cat(new_v), self.meta.kv_pos)

    def attend(self, window=None, softcap=None, sinks=None) -> tuple[Tensor, Tensor]:
        """Return what the kernel says, and what plain attention says."""
        options = {"window": window, "softcap": softcap, "sinks": sinks, "scale": 0.3}
        actual = paged_attention(
            torch.cat(self.queries), self.k_cache, self.v_cache, self.meta, **options
        )
        alone = zip(self.queries, self.keys, self.values, strict=True)
        return actual, torch.cat([eager(q, k, v, **options) for q, k, v in alone])


def sequences(longest: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Decode rows first, then chunks, some fresh and some behind a prefix."""
    decode = st.tuples(st.just(1), st.integers(1, longest))
    chunk = st.integers(2, longest).flatmap(
        lambda context: st.tuples(st.integers(2, context), st.just(context))
    )
    return (
        st.tuples(st.lists(decode, max_size=6), st.lists(chunk, max_size=3))
        .map(lambda parts: (*parts[0], *parts[1]))
        .filter(bool)
    )


shapes = st.sampled_from(
    [
        Shape(),
        Shape(heads=2),
        Shape(heads=4, kv_heads=1, k_dim=12, v_dim=8),
        Shape(3, 3, 4, 4),
        Shape(6, 2, 32, 32),
        Shape(5, 1, 64, 96),
    ]
)


@given(
    sequences(70),
    shapes,
    st.none() | st.sampled_from([1, 4, 16, 33]),
    st.none() | st.just(2.0),
    st.booleans(),
    st.integers(0, 5),
)
def test_equals_plain_attention(rows, shape, window, softcap, with_sinks, seed) -> None:
    paged = Paged(Case(rows, shape, seed=seed))
    sinks = torch.linspace(-1, 1, shape.heads) if with_sinks else None
    actual, expected = paged.attend(window, softcap, sinks)
    assert_close(actual, expected)


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_long_contexts_fall_into_classes_of_their_own(window, softcap) -> None:
    rows = ((1, 700), (1, 3), (1, 256), (1, 257), (1, 513), (1, 16), (200, 600), (150, 150))
    actual, expected = Paged(Case(rows, Shape())).attend(window, softcap)
    assert_close(actual, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bf16_differs_by_rounding_only(softcap) -> None:
    rows = ((1, 40), (1, 17), (9, 33), (20, 20))
    paged = Paged(Case(rows, Shape(k_dim=64, v_dim=64), dtype=torch.bfloat16))
    actual, expected = paged.attend(softcap=softcap)
    assert actual.dtype == torch.bfloat16
    assert_close(actual, expected)


@pytest.mark.parametrize("compiled", [True], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(None, None, 0), (40, 3.0, 1)])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(9, 3, 64, 64),
        Shape(7, 1, 128, 128),
        Shape(2, 2, 96, 32),
        Shape(4, 2, 32, 256),
        Shape(6, 2, 24, 40),
        Shape(1, 1, 5, 3),
    ],
    ids=str,
)
def test_heads_of_every_size(shape, window, softcap, sinks, dtype) -> None:
    paged = Paged(Case(((1, 700), (1, 3), (1, 1), (1, 16), (1, 65), (9, 90)), shape, dtype))
    column = torch.linspace(-1, 1, shape.heads) if sinks else None
    actual, expected = paged.attend(window, softcap, column)
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        (Shape(9, 3, 64, 64), None),
        (Shape(9, 3, 64, 64), 40),
        (Shape(2, 1, 128, 32), None),
        (Shape(6, 2, 24, 40), None),
        (Shape(1, 1, 5, 3), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [True], indirect=True)
def test_a_row_has_the_same_bits_beside_any_other_and_in_any_chunk(shape, window, dtype) -> None:
    paged = Paged(Case(((1, 300), (5, 90), (1, 17), (30, 33)), shape, dtype))
    together, _ = paged.attend(window)
    q = torch.cat(paged.queries)
    for row in range(len(q)):
        sequence = paged.meta.sequences[row]
        alone = AttentionMeta(
            kv_pos=paged.meta.kv_pos[row : row + 1],
            context_lens=paged.meta.lengths[row : row + 1],
            block_tables=paged.meta.block_tables[sequence][None].contiguous(),
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            block_size=paged.meta.block_size,
            num_decodes=1,
        )
        found = paged_attention(
            q[row : row + 1], paged.k_cache, paged.v_cache, alone, scale=0.3, window=window
        )
        assert torch.equal(found[0], together[row])


def test_q_may_be_a_transposed_view() -> None:
    paged = Paged(Case(((1, 5), (3, 9)), Shape()))
    q = torch.cat(paged.queries)
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    first = paged_attention(q, paged.k_cache, paged.v_cache, paged.meta, scale=1.0)
    second = paged_attention(strided, paged.k_cache, paged.v_cache, paged.meta, scale=1.0)
    assert torch.equal(first, second)
    assert second.is_contiguous()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_row_does_not_reach_the_next_owner_of_its_block(bad: float) -> None:
    paged = Paged(Case(((1, 5), (3, 9)), Shape()), poison=0.0)
    everywhere = torch.arange(len(paged.k_cache))
    free = everywhere[~torch.isin(everywhere, paged.meta.kv_pos)]
    kept_k, kept_v = paged.k_cache.clone(), paged.v_cache.clone()
    shape = (len(free), *paged.k_cache.shape[1:])
    write_kv(paged.k_cache, paged.v_cache, torch.full(shape, bad), torch.full(shape, bad), free)
    for index in range(2):
        context = int(paged.meta.context_lens[index])
        blocks = paged.meta.block_tables[index].repeat_interleave(BLOCK) * BLOCK
        at = (blocks + torch.arange(len(blocks)) % BLOCK)[:context]
        paged.k_cache[at], paged.v_cache[at] = kept_k[at], kept_v[at]
    actual, expected = paged.attend()
    assert_close(actual, expected)


@pytest.mark.parametrize("compiled", [False], indirect=True)
def test_layers_of_one_step_share_the_index_work() -> None:
    paged = Paged(Case(((1, 5), (3, 9)), Shape()))
    paged.attend()
    (groups,) = paged.meta._groups.values()
    paged.attend()
    assert list(paged.meta._groups.values()) == [groups]
    paged.attend(window=4)
    assert len(paged.meta._groups) == 2

"""Triton's paged attention is the reference, sees nothing else, and has its bits in any batch.

Without a GPU this is Triton's interpreter. Whatever no row may see is NaN in every cache here.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oneplusn.kernels import attention_reference, triton_attention_backend
from oneplusn.kernels.cpu_attention import new_cache
from oneplusn.kernels.triton_attention_backend import paged_attention, shape_for, write_kv
from paged_steps import Context, Heads, Step, draw, lay_out
from tolerances import assert_close

Options = dict[str, object]
EVERYTHING: Options = {"window": 20, "softcap": 2.0, "sinks": torch.linspace(-1, 1, 4)}
PLAIN: Options = {}


def attend(step: Step, **options: object) -> Tensor:
    return paged_attention(
        step.q, step.k_cache, step.v_cache, step.meta, **({"scale": 0.3} | options)
    )


def expected(step: Step, **options: object) -> Tensor:
    return attention_reference.paged_attention(
        step.q, step.k_cache, step.v_cache, step.meta, **({"scale": 0.3} | options)
    )


decodes = st.lists(st.integers(1, 70).map(lambda length: (1, length)), max_size=3)
chunks = st.lists(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=2
)
heads = st.sampled_from([Heads(), Heads(3, 1, 12, 8), Heads(2, 2, 16, 40), Heads(7, 1, 24, 24)])


@settings(max_examples=10)
@given(
    decodes,
    chunks,
    heads,
    st.none() | st.sampled_from([1, 4, 16, 33]),
    st.none() | st.just(2.0),
    st.booleans(),
    st.integers(0, 5),
)
def test_it_is_the_reference(decoded, chunked, shape, window, softcap, with_sinks, seed) -> None:
    sizes = [*decoded, *chunked] or [(1, 1)]
    step = lay_out(draw(sizes, shape, seed=seed), num_decodes=len(decoded), seed=seed)
    if window is not None:
        step = step.hide_what_windows_hide(window)
    sinks = torch.linspace(-1, 1, shape.heads) if with_sinks else None
    options: Options = {"window": window, "softcap": softcap, "sinks": sinks}
    assert_close(attend(step, **options), expected(step, **options))


@pytest.mark.parametrize(
    ("k_dim", "v_dim"), [(32, 32), (64, 64), (80, 80), (96, 96), (128, 64), (256, 256)]
)
def test_heads_of_every_size(k_dim: int, v_dim: int) -> None:
    step = lay_out(draw([(1, 18), (2, 5)], Heads(2, 1, k_dim, v_dim)))
    assert_close(attend(step), expected(step))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bits_differ_by_rounding_only(dtype: torch.dtype) -> None:
    step = lay_out(draw([(1, 50), (5, 21)], Heads(k_dim=32, v_dim=32), dtype))
    options = EVERYTHING | {"sinks": torch.linspace(-1, 1, 4).to(dtype)}
    actual = attend(step, **options)
    assert actual.dtype == dtype
    assert_close(actual, expected(step, **options))


def test_what_a_window_hides_is_not_read() -> None:
    step = lay_out(draw([(1, 70), (1, 30), (5, 50), (9, 9)], Heads())).hide_what_windows_hide(20)
    assert_close(attend(step, window=20), expected(step, window=20))


@pytest.mark.parametrize("window", [None, 2])
def test_every_sequence_has_its_tiles(window: int | None) -> None:
    """Tiles of eight rows: one row, then two tiles, then what three sequences begin in."""
    sizes = [(1, 4), (9, 9), (3, 12), (8, 8), (1, 1)]
    step = lay_out(draw(sizes, Heads()), num_decodes=0)
    assert_close(attend(step, window=window), expected(step, window=window))


@pytest.mark.parametrize("window", [None, 20, 100])
@pytest.mark.parametrize("length", [32, 33, 96, 97, 160, 225])
def test_a_long_context_has_longer_splits_not_more(
    length: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits of 32 tokens, four at most: 97 tokens are the first that take longer ones."""
    monkeypatch.setattr(triton_attention_backend, "MAX_SPLITS", 4)
    step = lay_out(draw([(1, length)], Heads(2, 1)))
    assert_close(attend(step, window=window), expected(step, window=window))


def test_it_finds_its_sequence_among_many() -> None:
    """A program looks at 128 sequences at once; here most of them are padding."""
    few = draw([(1, 3), (1, 40), (3, 20)], Heads(1, 1))
    nothing = Context(few[0].q, few[0].k[:0], few[0].v[:0])
    no_rows = Context(few[0].q[:0], few[0].k, few[0].v)
    decoded = [few[0], *[nothing] * 130, few[1]]
    step = lay_out([*decoded, *[no_rows] * 130, few[2]], num_decodes=len(decoded))
    actual = attend(step, scale=0.5)
    assert_close(actual, expected(step, scale=0.5))
    assert not actual[1:131].any()


MIX = ((1, 70), (1, 1), (1, 16), (1, 33), (5, 21), (16, 16), (9, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_each_request_has_the_bits_that_it_has_alone(options: Options, dtype: torch.dtype) -> None:
    contexts = draw(MIX, Heads(), dtype)
    together = attend(lay_out(contexts), **options).split([rows for rows, _ in MIX])
    for index in (0, 2, 3, 4, 6):
        alone = attend(lay_out([contexts[index]], seed=9), **options)
        assert torch.equal(alone, together[index])


def test_any_number_of_programs_gives_equal_bits() -> None:
    step = lay_out(draw([(1, 70), (1, 5), (1, 40)], Heads()))
    one = attend(step, programs=1)
    for programs in (2, 7):
        assert torch.equal(attend(step, programs=programs), one)


@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_a_row_of_a_prompt_has_its_bits_in_any_chunk(options: Options) -> None:
    (whole,) = draw([(45, 45)], Heads())
    at_once = attend(lay_out([whole], num_decodes=0), **options)
    for cuts in ([0, 20, 45], [0, 1, 17, 44, 45]):
        chunks = [
            attend(lay_out([whole.last(stop - start, stop)], num_decodes=0), **options)
            for start, stop in pairwise(cuts)
        ]
        assert torch.equal(torch.cat(chunks), at_once)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_a_query_that_is_not_finite_stays_in_its_row() -> None:
    step = lay_out(draw([(1, 20), (1, 20), (3, 20)], Heads()))
    clean = attend(step)
    step.q[0], step.q[3, 2] = math.nan, math.inf
    spoilt = attend(step)
    assert not spoilt[0].isfinite().any()
    assert torch.equal(spoilt[1:3], clean[1:3])
    assert torch.equal(spoilt[4], clean[4])
    assert not spoilt[3, 2].isfinite().any()
    assert torch.equal(spoilt[3, :2], clean[3, :2])


def test_q_may_be_strided_and_sinks_of_another_dtype() -> None:
    step = lay_out(draw([(1, 5), (3, 9)], Heads()))
    strided = Step(
        step.q.transpose(0, 1).contiguous().transpose(0, 1), step.k_cache, step.v_cache, step.meta
    )
    sinks = torch.linspace(-1, 1, 4).bfloat16()
    actual = attend(strided, sinks=sinks)
    assert torch.equal(actual, attend(step, sinks=sinks.float()))
    assert actual.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_are_written_where_they_belong_and_are_finite(dtype: torch.dtype) -> None:
    k, v = (torch.randn(2, 5, 3, d).to(dtype)[1].transpose(0, 1) for d in (8, 12))
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    k[1, 0, 0], k[1, 1, 1], v[2, 2, 2] = math.nan, math.inf, -math.inf
    places = torch.tensor([3, 40, 0, -1, 17])
    caches = [new_cache(48, 3, d, dtype).fill_(7) for d in (8, 12)]
    wanted = [cache.clone() for cache in caches]
    write_kv(*caches, k, v, places)
    attention_reference.write_kv(*wanted, k, v, places)
    for cache, want in zip(caches, wanted, strict=True):
        assert torch.equal(cache, want)
        assert cache.isfinite().all()


def test_an_empty_step_launches_nothing() -> None:
    step = lay_out(draw([(0, 3)], Heads()))
    assert attend(step).shape == (0, 4, 8)
    write_kv(step.k_cache, step.v_cache, step.q[:, :2], step.q[:, :2], step.meta.kv_pos)


@pytest.mark.parametrize("itemsize", [2, 4], ids=["16 bits", "fp32"])
@pytest.mark.parametrize("capability", [75, 80, 86, 90, 100])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256])
def test_there_are_block_shapes_for_every_head(dim: int, capability: int, itemsize: int) -> None:
    for phase in ("decode", "prefill"):
        shape = shape_for(phase, capability, (dim, 16), itemsize)
        assert shape.split % shape.columns == 0

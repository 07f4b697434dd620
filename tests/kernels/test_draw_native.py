"""Tokens by the compiled kernel: what it draws follows from sorting in fp64, up to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oneplusn.kernels import draw_native, native
from oneplusn.kernels.draw_native import Draws

pytestmark = pytest.mark.skipif(native.loaded() is None, reason="there is no C++ compiler")
LARGEST = 1 - 2.0**-52
ROUNDING = 2e-6


def draws(count: int, **given: object) -> Draws:
    """Draw from the first `count` rows, by default from whole distributions in their middle."""
    default = {
        "rows": np.arange(count),
        "factors": np.ones(count, np.float32),
        "top_k": np.zeros(count, np.int64),
        "top_p": np.ones(count),
        "min_p": np.zeros(count),
        "uniform": np.full(count, 0.5),
    }
    return Draws(**{name: np.asarray(given.get(name, each), each.dtype)
                    for name, each in default.items()})  # fmt: skip


def pick(row: list[float], **given: float) -> int:
    """Draw from one row."""
    single = {name: [value] for name, value in given.items()}
    return draw_native.draw(torch.tensor([row]), draws(1, **single))[0]


def kept(logits: Tensor, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Return the distribution of a row by sorting, in fp64."""
    weights = torch.softmax(logits.double(), -1).numpy()
    limit = 0.0
    if top_k:
        limit = np.sort(weights)[::-1][min(top_k, len(weights)) - 1]
    weights[weights < limit] = 0
    if top_p < 1:
        order = np.sort(weights)[::-1]
        reach = order.cumsum()
        place = np.searchsorted(reach, top_p * reach[-1])
        weights[weights < order[min(place, len(order) - 1)]] = 0
    weights[weights < min_p * weights.max()] = 0
    return weights / weights.sum()


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    columns=st.sampled_from([1, 2, 127, 128, 129, 300, 5000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    top_k=st.sampled_from([0, 1, 2, 64, 100, 3000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.3, 1.0]),
    uniform=st.floats(0, LARGEST),
)
def test_the_number_falls_into_the_tokens_part_of_what_is_kept(
    seed, columns, spread, top_k, top_p, min_p, uniform
):
    noise = np.random.default_rng(seed).normal(size=(1, columns)) * spread
    # Few different values, so that most of them tie with others.
    logits = torch.from_numpy(np.round(noise * 8) / 8).float()
    given = {"top_k": [top_k], "top_p": [top_p], "min_p": [min_p], "uniform": [uniform]}
    token = draw_native.draw(logits, draws(1, **given))[0]

    # Where a target is met to the last digit, rounding decides whether one more value is kept.
    near = (top_p,) if top_p in (1.0, 1e-9) else (top_p, top_p - ROUNDING, top_p + ROUNDING)
    fits = list[bool]()
    for p in near:
        part = kept(logits[0], top_k, p, min_p)
        reach = part.cumsum()
        fits.append(
            part[token] > 0
            and reach[token] - part[token] - ROUNDING <= uniform <= reach[token] + ROUNDING
        )
    assert any(fits), token


EQUAL = [0.0, 2.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("uniform", "given", "token"),
    [
        (0.0, {}, 0),
        (LARGEST, {}, 4),
        (0.0, {"top_k": 1}, 1),
        (LARGEST, {"top_k": 1}, 4),
        (LARGEST, {"top_k": 4, "top_p": 0.5}, 4),
        (0.0, {"top_p": 0.01}, 1),
        (LARGEST, {"min_p": 1.0}, 4),
        (0.5, {"min_p": 1.0}, 2),
        (0.0, {"factors": 100.0}, 1),
    ],
)
def test_equal_logits_are_kept_together_and_looked_up_in_the_order_of_their_ids(
    uniform: float, given: dict[str, float], token: int
) -> None:
    assert pick(EQUAL, uniform=uniform, **given) == token


def test_what_is_impossible_is_never_drawn() -> None:
    row = [-torch.inf] * 100
    row[70] = row[77] = 0.0

    assert pick(row, uniform=0.0) == 70
    assert pick(row, uniform=LARGEST) == 77
    assert pick(row, uniform=LARGEST, top_k=50, top_p=0.999) == 77


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_a_row_without_a_distribution_yields_no_token_and_disturbs_no_other(value: float) -> None:
    logits = torch.zeros(2, 100)
    logits[1] = value

    assert draw_native.draw(logits, draws(2)) == [*draw_native.draw(logits[:1], draws(1)), -1]


def test_tokens_depend_neither_on_other_rows_nor_on_threads_nor_on_the_dtype() -> None:
    logits = torch.randn(24, 3001, generator=torch.Generator().manual_seed(3)).bfloat16()
    wide = torch.zeros(24, 4000)
    wide[:, :3001] = logits
    given = {
        "factors": np.linspace(0.5, 3, 24),
        "top_k": [0, 5, 700] * 8,
        "top_p": [0.9, 1.0, 0.5, 0.99] * 6,
        "min_p": [0.0, 0.01] * 12,
        "uniform": np.linspace(0, LARGEST, 24),
    }
    before, tokens = native.threads(), list[list[int]]()
    try:
        for count in (1, 3):
            native._Threads.count = count
            tokens += [
                draw_native.draw(logits, draws(24, **given)),
                draw_native.draw(wide[:, :3001], draws(24, **given)),
            ]
    finally:
        native._Threads.count = before
    alone = [
        draw_native.draw(
            logits, draws(1, rows=[row], **{name: [each[row]] for name, each in given.items()})
        )[0]
        for row in range(24)
    ]

    assert tokens == [alone] * 4
    assert len(set(alone)) > 12

"""Which block shapes a site gets, and where K is cut."""

from __future__ import annotations

import pytest
import torch

from oneplusn.kernels import tuning
from oneplusn.kernels.plan import SiteSpec


@pytest.mark.parametrize(("rows", "expected"), [(1, 16), (256, 16), (257, 64), (8192, 64)])
def test_tile_rows_of_a_step(rows: int, expected: int) -> None:
    assert tuning.tile_rows(rows) == expected


@pytest.mark.parametrize(
    ("in_features", "block_k", "goal", "expected"),
    [
        pytest.param(4096, 128, 512, 512, id="eight whole parts"),
        pytest.param(14_336, 128, 1024, 1024, id="fourteen whole parts"),
        pytest.param(14_336, 128, 512, 896, id="16 parts where 28 are too many"),
        pytest.param(14_336, 64, 4096, 3584, id="four parts where 3.5 would be the goal"),
        pytest.param(11_008, 128, 512, 768, id="no number of parts: 15 of 768, with masks"),
        pytest.param(64, 128, 512, 512, id="less than a block"),
        pytest.param(576, 64, 512, 192, id="three parts where two are no whole blocks"),
        pytest.param(100_000, 128, 512, 6272, id="at most 16 parts"),
    ],
)
def test_even_split_of(in_features: int, block_k: int, goal: int, expected: int) -> None:
    assert tuning.even_split(in_features, block_k, goal) == expected
    assert -(-in_features // expected) <= tuning.MAX_SPLITS


@pytest.mark.parametrize(
    ("columns", "tile_rows", "capability", "block_n", "block_k"),
    [
        (6144, 16, 90, 128, 128),
        (28_672, 16, 90, 256, 128),
        (28_672, 16, 80, 128, 128),
        (28_672, 16, 89, 128, 128),
        (28_672, 64, 90, 64, 64),
        (6144, 64, 100, 64, 64),
        (6144, 16, 75, 128, 128),
        (6144, 64, 0, 32, 32),
    ],
)
def test_choice_of(
    columns: int, tile_rows: int, capability: int, block_n: int, block_k: int
) -> None:
    shape = tuning.choice_of(SiteSpec("site", 64, (columns,), ("m",)), tile_rows, capability).shape
    assert (shape.block_n, shape.block_k) == (block_n, block_k)


@pytest.mark.parametrize("choice", [*tuning.TABLE, tuning.INTERPRETED])
def test_every_choice_says_what_chose_it(choice: tuning.Choice) -> None:
    assert choice.reason.startswith(("estimate: ", "measured: ", "for tests: "))


def test_a_cpu_has_the_interpreter_s_shapes_with_k_cut_evenly() -> None:
    spec = SiteSpec("site", 96, (64,), ("m",))
    shape = tuning.shape_of(spec, 16, torch.device("cpu"))
    assert shape == tuning.INTERPRETED.shape._replace(split_k=32)

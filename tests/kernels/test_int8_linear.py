"""Weights in 8 bits: what they are rounded to, and the product over them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from oneplusn.kernels import cpu_linear, native
from oneplusn.kernels.cpu_linear import Int8Weight, Panels
from tolerances import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    yield
    native.use_threads(1)


def packed(weight: Tensor, bias: Tensor | None = None) -> Panels:
    elements = cpu_linear.size_of(weight.shape, torch.int8)
    (panels,) = cpu_linear.pack([(weight, bias)], elements, torch.int8)
    return panels


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("row", "codes", "scale"),
    [
        pytest.param([127, -127, 1, 0], [127, -127, 1, 0], 1, id="whole numbers are their codes"),
        pytest.param([254, -2, 4, 3.1], [127, -1, 2, 2], 2, id="the largest is 127"),
        pytest.param([-127, 0.5, 1.5, -2.5], [-127, 0, 2, -2], 1, id="halves go to the even"),
        pytest.param([-63.5, 0.24, 0.26, 0], [-127, 0, 1, 0], 0.5, id="the largest is negative"),
        pytest.param([0, 0, 0, 0], [0, 0, 0, 0], 0, id="nothing stays nothing"),
    ],
)
@DTYPES
def test_a_row_is_rounded_to(row: list, codes: list, scale: float, dtype: torch.dtype) -> None:
    rounded = Int8Weight.of(torch.tensor([row], dtype=dtype))
    assert rounded.codes.tolist() == [codes]
    assert rounded.scales.tolist() == [scale]
    assert rounded.values(torch.float32).tolist() == [[code * scale for code in codes]]


ROWS = st.lists(
    st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=3, max_size=3),
    min_size=1,
    max_size=4,
)


@given(rows=ROWS)
def test_no_value_is_off_by_more_than_half_a_step(rows: list) -> None:
    weight = torch.tensor(rows)
    rounded = Int8Weight.of(weight)
    error = (rounded.values(torch.float64) - weight.double()).abs()
    assert torch.all(error <= 0.500001 * rounded.scales[:, None].double() + 1e-43)


@given(rows=ROWS)
def test_a_row_is_rounded_alone_and_like_its_opposite(rows: list) -> None:
    weight = torch.tensor(rows)
    codes, scales = Int8Weight.of(weight)
    opposite = Int8Weight.of(-weight)
    assert torch.equal(opposite.codes, -codes)
    assert torch.equal(opposite.scales, scales)
    for row in range(len(weight)):
        alone = Int8Weight.of(weight[row : row + 1])
        assert torch.equal(alone.codes, codes[row : row + 1])
        assert torch.equal(alone.scales, scales[row : row + 1])


def test_a_weight_of_many_rows_is_rounded_in_parts() -> None:
    weight = normal(cpu_linear.ROUNDED_ROWS + 3, 4)
    last = Int8Weight.of(weight[-3:])
    whole = Int8Weight.of(weight)
    assert torch.equal(whole.codes[-3:], last.codes)
    assert torch.equal(whole.scales[-3:], last.scales)


@DTYPES
def test_every_code_is_what_it_stands_for(dtype: torch.dtype) -> None:
    codes = torch.arange(-127, 128).to(dtype)
    weight = torch.stack([codes, codes.flip(0)]).repeat(1, 2)[:, :508]
    # Row i of the identity takes input i of both outputs.
    assert torch.equal(packed(weight).multiply(torch.eye(508, dtype=dtype)), weight.T)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 16, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (64, 32), (66, 33), (256, 300)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product_bit_for_bit_where_sums_are_exact(
    rows: int, inputs: int, outputs: int, with_bias: bool, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=draw).to(dtype)
    weight[:, 0] = 127  # so that the scale is 1
    bias = torch.arange(outputs).to(dtype) if with_bias else None
    x = torch.randint(-8, 9, (rows, inputs), generator=draw).to(dtype)
    assert torch.equal(packed(weight, bias).multiply(x), linear(x, weight, bias))


@DTYPES
@pytest.mark.parametrize("rows", [1, 21])
def test_it_is_the_product_with_what_the_weight_is_rounded_to(
    rows: int, dtype: torch.dtype
) -> None:
    weight, x = (normal(200, 576) / 24).to(dtype), normal(rows, 576, seed=1).to(dtype)
    values = Int8Weight.of(weight).values(torch.float64)
    assert_close(packed(weight).multiply(x), linear(x.double(), values).to(dtype))


@DTYPES
def test_a_row_has_the_same_bits_alone_and_in_any_batch_on_any_threads(dtype: torch.dtype) -> None:
    weight, x = normal(1000, 352).to(dtype), normal(40, 352, seed=1).to(dtype)
    panels = packed(weight)
    together = panels.multiply(x)
    for threads in (1, 2, 3):
        native.use_threads(threads)
        for rows in (slice(0, 1), slice(3, 4), slice(5, 18), slice(0, 40)):
            assert torch.equal(panels.multiply(x[rows]), together[rows])


def test_rows_may_lie_apart() -> None:
    weight, x = normal(32, 64), normal(5, 64, seed=1).repeat(1, 2)[:, :64]
    assert not x.is_contiguous()
    panels = packed(weight)
    assert torch.equal(panels.multiply(x), panels.multiply(x.contiguous()))


def test_a_weight_that_lies_transposed_is_packed_like_any_other() -> None:
    weight, x = normal(64, 33), normal(3, 64, seed=1)
    assert torch.equal(packed(weight.T).multiply(x), packed(weight.T.contiguous()).multiply(x))


@pytest.mark.parametrize(
    ("dtype", "width", "can"),
    [
        (torch.float32, 4, True),
        (torch.bfloat16, 4, True),
        (torch.float32, 3, False),
        (torch.bfloat16, 3, False),
        (torch.float16, 4, False),
    ],
)
def test_what_can_be_packed(dtype: torch.dtype, width: int, can: bool) -> None:
    assert cpu_linear.takes(torch.ones(2, width, dtype=dtype), torch.int8) is can


def test_a_weight_takes_a_byte_and_an_output_four_more() -> None:
    assert packed(normal(64, 576).bfloat16()).num_bytes == 64 * 576 + 64 * 4


def test_weights_lie_one_after_another_in_one_buffer() -> None:
    weights = [normal(*shape) for shape in [(33, 8), (7, 6), (64, 2)]]
    elements = sum(cpu_linear.size_of(weight.shape, torch.int8) for weight in weights)
    all_packed = cpu_linear.pack([(weight, None) for weight in weights], elements, torch.int8)
    for weight, panels in zip(weights, list(all_packed), strict=True):
        x = normal(3, weight.shape[1])
        assert torch.equal(panels.multiply(x), packed(weight).multiply(x))
        assert panels.arguments.panels % cpu_linear.ALIGNMENT == 0

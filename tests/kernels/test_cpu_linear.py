"""The compiled linear: the product, bit for bit where sums are exact, whatever else is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from oneplusn.kernels import cpu_linear, native, ops
from oneplusn.kernels.cpu_linear import Panels
from tolerances import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    yield
    native.use_threads(1)


def packed(weight: Tensor, bias: Tensor | None = None) -> Panels:
    elements = cpu_linear.size_of(weight.shape, weight.dtype)
    (panels,) = cpu_linear.pack([(weight, bias)], elements, weight.dtype)
    return panels


def whole_numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small enough that every sum of products is exact in fp32, and so in any order."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=draw).to(dtype)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 16, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (64, 32), (66, 33), (256, 300)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product_bit_for_bit_where_sums_are_exact(
    rows: int, inputs: int, outputs: int, with_bias: bool, dtype: torch.dtype
) -> None:
    weight = whole_numbers(outputs, inputs, dtype=dtype)
    bias = whole_numbers(outputs, dtype=dtype, seed=1) if with_bias else None
    x = whole_numbers(rows, inputs, dtype=dtype, seed=2)
    assert torch.equal(packed(weight, bias).multiply(x), linear(x, weight, bias))


@DTYPES
def test_it_is_the_product_of_anything_else_up_to_rounding(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 576, generator=draw).to(dtype) for n in (200, 21))
    weight /= 24  # so that outputs are about 1
    assert_close(packed(weight).multiply(x), linear(x.double(), weight.double()).to(dtype))


@DTYPES
def test_a_row_has_the_same_bits_alone_and_in_any_batch_on_any_threads(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 352, generator=draw).to(dtype) for n in (1000, 40))
    panels = packed(weight)
    together = panels.multiply(x)
    for threads in (1, 2, 3):
        native.use_threads(threads)
        for rows in (slice(0, 1), slice(3, 4), slice(5, 18), slice(0, 40)):
            assert torch.equal(panels.multiply(x[rows]), together[rows])


@DTYPES
def test_rows_may_lie_apart(dtype: torch.dtype) -> None:
    weight, wide = (whole_numbers(n, 64, dtype=dtype) for n in (32, 5))
    x = wide.repeat(1, 2)[:, :64]
    assert not x.is_contiguous()
    assert torch.equal(packed(weight).multiply(x), linear(x, weight))


def test_no_rows_are_no_work() -> None:
    assert packed(torch.ones(3, 4)).multiply(torch.empty(0, 4)).shape == (0, 3)


@pytest.mark.parametrize(
    ("dtype", "width", "can"),
    [
        (torch.float32, 3, True),
        (torch.bfloat16, 4, True),
        (torch.bfloat16, 3, False),
        (torch.float16, 4, False),
        (torch.float64, 4, False),
    ],
)
def test_what_can_be_packed(dtype: torch.dtype, width: int, can: bool) -> None:
    assert cpu_linear.takes(torch.ones(2, width, dtype=dtype), dtype) is can


def test_without_a_compiler_nothing_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled", lambda: False)
    assert not cpu_linear.takes(torch.ones(2, 4), torch.float32)


def test_weights_lie_one_after_another_in_one_buffer() -> None:
    shapes = [(33, 8), (7, 6), (64, 2)]
    weights = [whole_numbers(*shape, dtype=torch.bfloat16) for shape in shapes]
    elements = sum(cpu_linear.size_of(shape, torch.bfloat16) for shape in shapes)
    for weight, panels in zip(
        weights,
        list(cpu_linear.pack([(w, None) for w in weights], elements, torch.bfloat16)),
        strict=True,
    ):
        x = whole_numbers(3, weight.shape[1], dtype=torch.bfloat16)
        assert torch.equal(panels.multiply(x), linear(x, weight))
        assert panels.arguments.panels % cpu_linear.ALIGNMENT == 0

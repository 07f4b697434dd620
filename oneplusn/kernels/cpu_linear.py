"""Matrix products on the CPU over weights that lie in the order in which they are read.

Every weight of a model is put into one buffer of large pages: with pages of 4 KiB a thread read
16 GB/s here (AMD EPYC, Zen 4), with those of 2 MiB 31. They may be kept in 8 bits, which halves
what a step reads; inputs, sums and outputs stay what they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from oneplusn.kernels import native, ops
from oneplusn.kernels.buffers import zeros

PANEL = 32
"""Outputs of a panel."""
DEPTH = {torch.bfloat16: 2, torch.float32: 1}
"""Inputs of a step of a panel, by dtype."""
INT8_DEPTH = 2
"""The same of a panel in 8 bits, whatever the inputs are."""
LARGEST_CODE = 127
ROUNDED_ROWS = 1024
"""Rows of a weight that are rounded at a time, so that little memory is needed on the way."""
ALIGNMENT = 64
"""Bytes."""


class LinearArguments(ctypes.Structure):
    """`Linear` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "bias", "scales")),
        *((name, ctypes.c_int64) for name in ("width", "columns")),
    )


class Int8Weight(NamedTuple):
    """A weight `[N, K]` rounded to whole multiples of one step for each output.

    Attributes:
        codes: int8 `[N, K]`, -127 to 127.
        scales: fp32 `[N]`; 0 where a row is.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """Round a weight to the nearest, ties to even.

        Semantics:
            scales[n] = max_k |weight[n, k]| / 127; codes[n, k] = round(weight[n, k] / scales[n]),
            so no value is off by more than half a scale.
        """
        codes = torch.empty(weight.shape, dtype=torch.int8)
        scales = weight.new_empty(len(weight), dtype=torch.float32)
        parts = zip(*(t.split(ROUNDED_ROWS) for t in (weight, codes, scales)), strict=True)
        for values, code, scale in parts:
            exact = values.detach().float()
            torch.div(exact.abs().amax(1), LARGEST_CODE, out=scale)
            ratio = exact / scale.where(scale > 0, 1.0)[:, None]
            code.copy_(ratio.round_().clamp_(-LARGEST_CODE, LARGEST_CODE))
        return cls(codes, scales)

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return what the codes stand for, `[N, K]`."""
        return (self.codes * self.scales[:, None]).to(dtype)


class Panels:
    """The weight and bias of one linear, packed.

    Attributes:
        dtype: Of bias, inputs and outputs, and of the weight where it is not in int8.
        width: Inputs K.
        columns: Outputs N.
        arguments: What the compiled kernel is called with; valid as long as this lives.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> None:
        """Copy a weight `[N, K]` into a buffer of zeros as large as `size_of` says.

        It is rounded to int8 where that is the buffer's dtype.
        """
        self.dtype = weight.dtype
        self.columns, self.width = weight.shape
        self._panels = buffer
        self._bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
        self._scales = None
        if buffer.dtype == torch.int8:
            rounded = Int8Weight.of(weight)
            self._scales = pad(rounded.scales, (0, -self.columns % PANEL))
            native.required().oneplusn_pack_int8_linear(
                rounded.codes.data_ptr(), buffer.data_ptr(), self.columns, self.width
            )
        else:
            weight = weight.detach().contiguous()
            native.required().oneplusn_pack_linear(
                weight.data_ptr(), buffer.data_ptr(), self._half, self.columns, self.width
            )
        self.arguments = LinearArguments(
            buffer.data_ptr(),
            *(None if t is None else t.data_ptr() for t in (self._bias, self._scales)),
            self.width,
            self.columns,
        )

    def multiply(self, x: Tensor) -> Tensor:
        """Compute the outputs of rows; a row's bits depend on the row alone.

        Semantics:
            y[t] = x[t] W^T + bias, x `[T, K]` with columns side by side -> y `[T, N]`; sums in
            fp32 over the inputs in their order, rounded once. In int8 the sums are those of the
            codes, and are multiplied by the scales.
        """
        assert x.dtype == self.dtype, (x.dtype, self.dtype)
        assert x.shape[1] == self.width, (x.shape, self.width)
        assert x.stride(1) == 1, x.stride()
        y = x.new_empty(len(x), self.columns)
        native.required().oneplusn_linear(
            ctypes.byref(self.arguments),
            self._half,
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            self.columns,
            len(x),
            native.threads(),
        )
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Read rows of the weight back, bit for bit: ids int64 [..] -> [.., K].

        Only of a weight that is kept in its own dtype.
        """
        assert self.stored == self.dtype, self.stored
        count = -(-self.columns // PANEL) * PANEL * self.width
        words = self._panels[:count].view(torch.int32)  # of DEPTH inputs each
        panels = words.view(-1, self.width // DEPTH[self.dtype], PANEL).transpose(1, 2)
        return panels[ids // PANEL, ids % PANEL].view(self.dtype)

    @property
    def stored(self) -> torch.dtype:
        """What the weight is kept in."""
        return self._panels.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight and its scales, and of the bias."""
        return sum(t.nbytes for t in (self._panels, self._bias, self._scales) if t is not None)

    @property
    def _half(self) -> bool:
        return self.dtype == torch.bfloat16


def takes(weight: Tensor, stored: torch.dtype) -> bool:
    """Tell whether a weight `[N, K]` can be packed for the compiled kernel, as it is or in int8."""
    depth = DEPTH.get(weight.dtype)
    if depth is not None and stored == torch.int8:
        depth = INT8_DEPTH
    fits = depth is not None and weight.shape[1] % depth == 0
    return fits and weight.device.type == "cpu" and ops.compiled()


def size_of(shape: tuple[int, ...], stored: torch.dtype) -> int:
    """Elements of a packed weight `[N, K]`, up to where the next may begin."""
    columns, width = shape
    elements = -(-columns // PANEL) * PANEL * width
    unit = ALIGNMENT // stored.itemsize
    return -(-elements // unit) * unit


def pack(
    linears: Iterable[tuple[Tensor, Tensor | None]], elements: int, stored: torch.dtype
) -> Iterator[Panels]:
    """Pack weights `[N, K]` and their biases into one buffer, each when it is asked for.

    Args:
        linears: Weight and bias of each.
        elements: The sum of their `size_of`.
        stored: What they are kept in: their own dtype, which all have in common, or int8.
    """
    unit = ALIGNMENT // stored.itemsize
    buffer = zeros((elements + unit,), stored, in_large_pages=True)
    buffer = buffer[-buffer.data_ptr() % ALIGNMENT // stored.itemsize :][:elements]
    begin = 0
    for weight, bias in linears:
        end = begin + size_of(weight.shape, stored)
        yield Panels(weight, bias, buffer[begin:end])
        begin = end
    assert begin == elements, (begin, elements)

"""Matrix products on the CPU over weights that lie in the order in which they are read.

Every weight of a model is put into one buffer of large pages: with pages of 4 KiB a thread read
16 GB/s here (AMD EPYC, Zen 4), with those of 2 MiB 31.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from oneplusn.kernels import native, ops
from oneplusn.kernels.buffers import zeros

PANEL = 32
"""Outputs of a panel."""
DEPTH = {torch.bfloat16: 2, torch.float32: 1}
"""Inputs of a step of a panel, by dtype."""
ALIGNMENT = 64
"""Bytes."""


class LinearArguments(ctypes.Structure):
    """`Linear` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "bias")),
        *((name, ctypes.c_int64) for name in ("width", "columns")),
    )


class Panels:
    """The weight and bias of one linear, packed.

    Attributes:
        dtype: Of weight, bias, inputs and outputs.
        width: Inputs K.
        columns: Outputs N.
        arguments: What the compiled kernel is called with; valid as long as this lives.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> None:
        """Copy a weight `[N, K]` into a buffer of zeros as large as `size_of` says."""
        self.dtype = weight.dtype
        self.columns, self.width = weight.shape
        self._panels = buffer
        self._bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
        weight = weight.detach().contiguous()
        native.required().oneplusn_pack_linear(
            weight.data_ptr(), buffer.data_ptr(), self._half, self.columns, self.width
        )
        self.arguments = LinearArguments(
            buffer.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.width,
            self.columns,
        )

    def multiply(self, x: Tensor) -> Tensor:
        """Compute the outputs of rows; a row's bits depend on the row alone.

        Semantics:
            y[t] = x[t] W^T + bias, x `[T, K]` with columns side by side -> y `[T, N]`; sums in
            fp32 over the inputs in their order, rounded once.
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

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight, and of the bias."""
        return self._panels.nbytes + (0 if self._bias is None else self._bias.nbytes)

    @property
    def _half(self) -> bool:
        return self.dtype == torch.bfloat16


def takes(weight: Tensor) -> bool:
    """Tell whether a weight `[N, K]` can be packed for the compiled kernel."""
    depth = DEPTH.get(weight.dtype)
    fits = depth is not None and weight.shape[1] % depth == 0
    return fits and weight.device.type == "cpu" and ops.compiled()


def size_of(weight: Tensor) -> int:
    """Elements of a packed weight, up to where the next may begin."""
    columns, width = weight.shape
    elements = -(-columns // PANEL) * PANEL * width
    unit = ALIGNMENT // weight.dtype.itemsize
    return -(-elements // unit) * unit


def pack(
    linears: Iterable[tuple[Tensor, Tensor | None]], elements: int, dtype: torch.dtype
) -> Iterator[Panels]:
    """Pack weights `[N, K]` and their biases into one buffer, each when it is asked for.

    Args:
        linears: Weight and bias of each.
        elements: The sum of their `size_of`.
        dtype: Of all of them.
    """
    unit = ALIGNMENT // dtype.itemsize
    buffer = zeros((elements + unit,), dtype, in_large_pages=True)
    buffer = buffer[-buffer.data_ptr() % ALIGNMENT // dtype.itemsize :][:elements]
    begin = 0
    for weight, bias in linears:
        end = begin + size_of(weight)
        yield Panels(weight, bias, buffer[begin:end])
        begin = end
    assert begin == elements, (begin, elements)

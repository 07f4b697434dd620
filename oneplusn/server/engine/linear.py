"""Linear layers with their weights in the layout that the CPU multiplies fastest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from oneplusn.kernels import cpu_linear
from oneplusn.kernels.cpu_linear import Int8Weight, Panels

# Rows that the layout is chosen for. It serves any number of rows; at 16, decode was as fast as or
# faster than with layouts chosen for 1, 64 or none (896 -> 4864, bf16).
PACKED_ROWS = 16


class CompiledLinear(nn.Module):
    """A linear layer that our own compiled kernel computes, from packed weights.

    Attributes:
        in_features: Width K of the input.
        out_features: Width N of the output.
        panels: Weight and bias.
    """

    def __init__(self, panels: Panels) -> None:
        """Compute with weights that were packed already."""
        super().__init__()
        self.out_features, self.in_features = panels.columns, panels.width
        # Neither a parameter nor a buffer: an opaque layout cannot be saved, cast or moved.
        self.panels = panels

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + bias: [.., K] -> [.., N]."""
        y = self.panels.multiply(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight and the bias."""
        return self.panels.num_bytes

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        stored = str(self.panels.stored).removeprefix("torch.")
        return f"{self.in_features}, {self.out_features}, compiled, {stored}"


class PanelEmbedding(nn.Module):
    """An embedding that reads its rows from the weight of the head that it is tied to."""

    def __init__(self, panels: Panels) -> None:
        """Read from the panels of the head."""
        super().__init__()
        self.panels = panels

    def forward(self, ids: Tensor) -> Tensor:
        """Look tokens up: [..] -> [.., K]."""
        return self.panels.rows(ids)


class PackedLinear(nn.Module):
    """A linear layer whose bf16 weight lies in oneDNN's own layout, where nothing is compiled.

    The result equals `F.linear` bit for bit. One thread, bf16, weights past the caches: 1.4 to 2.6
    times as fast at 1 to 16 rows (576 -> 1536 and back, 576 -> 49,152), equal from 256 rows on.

    Attributes:
        in_features: Width K of the input.
        out_features: Width N of the output.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy `weight` into the packed layout; the caller may then drop it.

        Args:
            weight: [N, K], bf16, on the CPU.
            bias: [N] or None.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Neither a parameter nor a buffer: an opaque layout cannot be saved, cast or moved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().contiguous(), PACKED_ROWS
        )
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + bias: [.., K] -> [.., N]."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return int(torch.ops.mkldnn._nbytes(self._packed))

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return f"{self.in_features}, {self.out_features}, packed"


def can_pack(weight: Tensor) -> bool:
    """Tell whether packing this weight is possible and of use."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(model: nn.Module, stored: torch.dtype | None = None) -> int:
    """Replace every plain linear of a model by its packed form, where that is possible.

    The original weights are freed, except where something else holds them, as tied embeddings
    do. Layers that subclass the linear keep their own arithmetic and are left alone.

    Args:
        model: On the CPU.
        stored: int8, for those weights that can be kept in it; None = as they are.

    Returns:
        How many were replaced.
    """
    names = _plain_linears(model)
    sizes: defaultdict[torch.dtype, dict[str, int]] = defaultdict(dict)
    for name in names:
        weight = _weight(model, name)
        kept = _kept_in(weight, stored)
        if cpu_linear.takes(weight, kept):
            sizes[kept][name] = cpu_linear.size_of(weight.shape, kept)
    for kept, elements in sizes.items():
        sources = ((_weight(model, name), _bias(model, name)) for name in elements)
        made = cpu_linear.pack(sources, sum(elements.values()), kept)
        for name, panels in zip(elements, made, strict=True):
            model.set_submodule(name, CompiledLinear(panels))
    if sizes:
        return sum(map(len, sizes.values()))
    packed = [name for name in names if can_pack(_weight(model, name))]
    for name in packed:
        model.set_submodule(name, PackedLinear(_weight(model, name), _bias(model, name)))
    return len(packed)


def _kept_in(weight: Tensor, stored: torch.dtype | None) -> torch.dtype:
    """Tell what a weight is to be kept in: int8 where that is wanted and possible."""
    return weight.dtype if stored is None or not cpu_linear.takes(weight, stored) else stored


@contextmanager
def rounded_linears(model: nn.Module, stored: torch.dtype) -> Iterator[None]:
    """Give linears the values that int8 will leave them, for a while.

    What shares its weight with a linear, as a tied embedding does, keeps its own.
    """
    originals = {}
    for name in _plain_linears(model):
        weight = _weight(model, name)
        if cpu_linear.takes(weight, stored):
            module = model.get_submodule(name)
            originals[module] = module.weight
            values = Int8Weight.of(weight).values(weight.dtype)
            values = values.t() if isinstance(module, Conv1D) else values
            module.weight = nn.Parameter(values, requires_grad=False)
    try:
        yield
    finally:
        for module, original in originals.items():
            module.weight = original


def _plain_linears(model: nn.Module) -> list[str]:
    """Name the linears that are no subclass."""
    return [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]


def _weight(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a linear as `[N, K]`; GPT-2 keeps its weights transposed."""
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


def _bias(model: nn.Module, name: str) -> Tensor | None:
    bias = model.get_submodule(name).bias
    assert bias is None or isinstance(bias, Tensor)
    return bias

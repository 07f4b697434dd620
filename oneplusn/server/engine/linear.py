"""Linear layers with their weights in the layout that the CPU multiplies fastest."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from oneplusn.kernels import cpu_linear
from oneplusn.kernels.cpu_linear import Panels

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
        return f"{self.in_features}, {self.out_features}, compiled"


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


def pack_linears(model: nn.Module) -> int:
    """Replace every plain linear of a model by its packed form, where that is possible.

    The original weights are freed, except where something else holds them, as tied embeddings
    do. Layers that subclass the linear keep their own arithmetic and are left alone.

    Returns:
        How many were replaced.
    """
    names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    weights = {name: _weight(model, name) for name in names}
    compiled = {name: weight for name, weight in weights.items() if cpu_linear.takes(weight)}
    packed = [] if compiled else [name for name, weight in weights.items() if can_pack(weight)]
    sizes: defaultdict[torch.dtype, dict[str, int]] = defaultdict(dict)
    for name, weight in compiled.items():
        sizes[weight.dtype][name] = cpu_linear.size_of(weight)
    del weights  # so that each is freed when its linear is replaced
    count = len(compiled) + len(packed)
    compiled.clear()
    for dtype, of_dtype in sizes.items():
        sources = ((_weight(model, name), _bias(model, name)) for name in of_dtype)
        made = cpu_linear.pack(sources, sum(of_dtype.values()), dtype)
        for name, panels in zip(of_dtype, made, strict=True):
            model.set_submodule(name, CompiledLinear(panels))
    for name in packed:
        model.set_submodule(name, PackedLinear(_weight(model, name), _bias(model, name)))
    return count


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

"""What the Triton kernels of one engine share: the staged plan, and memory between two items."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oneplusn.kernels.device_plan import DevicePlan, pack
from oneplusn.kernels.plan import Plan


class Scratch(NamedTuple):
    """Memory of one launch.

    Attributes:
        h: `[S, chunks, tile rows, 64]`, gated rank rows in the dtype of x. Undefined before.
        planes: fp32 `[splits, S, chunks, tile rows, 64]`, parts of h along K. Undefined before.
        control: int32, counters of the launch. All zero before and after.
    """

    h: Tensor
    planes: Tensor
    control: Tensor


class Workspace:
    """Buffers that grow to what was asked for and stay; one launch at a time may use them.

    Sites of a pool run one after the other on one stream, so they share one workspace. Control
    words are zero between launches; a launch that was broken off leaves them as they were, so
    whoever catches a device error makes a new workspace.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._staged: tuple[Plan, DevicePlan] | None = None
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._frozen = False

    def freeze(self) -> None:
        """Let nothing grow from now on: a captured graph holds the addresses of the buffers."""
        self._frozen = True

    def stage(self, plan: Plan) -> DevicePlan:
        """Return the plan in device memory; the copy is made once per plan, not once per site."""
        if self._staged is None or self._staged[0] is not plan:
            self._staged = plan, pack(plan).to(self._device)
        return self._staged[1]

    def scratch(self, plan: DevicePlan, *, slices: int, splits: int, dtype: torch.dtype) -> Scratch:
        """Return memory for one launch of a site with `slices`, K cut into `splits`."""
        capacity = plan.capacity
        elements = slices * capacity.chunks * plan.tile_rows * plan.CHUNK
        words = 2 + slices * (capacity.tiles + capacity.chunks)
        return Scratch(
            h=self._at_least("h", elements, dtype),
            planes=self._at_least("planes", splits * elements, torch.float32),
            control=self._at_least("control", words, torch.int32),
        )

    def _at_least(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < size:
            assert not self._frozen, f"{name} has to grow to {size} after a graph was captured"
            size = 1 << (size - 1).bit_length()
            buffer = torch.zeros(size, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
        return buffer

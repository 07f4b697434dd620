"""Large buffers that cost nothing until they are written."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Allocate zeros that the system commits page by page when they are first written.

    `torch.zeros` on the CPU writes all of them here and now, which takes 41 s for 4 GiB on a
    virtual machine.
    """
    if torch.device(device).type != "cpu" or not prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8))
    return raw.view(dtype).view(shape)

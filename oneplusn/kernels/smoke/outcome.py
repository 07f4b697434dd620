"""What comes of one check or one timing, and how an error is measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Norm of the error of a delta, relative to the norm of the delta."""
INTERPRETED_BOUNDS = BOUNDS | {torch.bfloat16: 2e-2}
"""Triton's interpreter cuts fp32 off to bf16 where a GPU rounds."""
ROW_FACTOR = 3
"""One row may be off by so much more: rows have larger and smaller gates."""


class Outcome(NamedTuple):
    """What comes of one piece of work.

    Attributes:
        value: The figure: an error, a number of replays, microseconds; None where there is none.
        fault: What is wrong; nothing = all is well.
        left_out: Why it was not done; nothing = it was.
        note: What else is worth a line.
    """

    value: float | None = None
    fault: str = ""
    left_out: str = ""
    note: str = ""


class Error(NamedTuple):
    """How far a result is from what it should be.

    Attributes:
        whole: Norm of the error of all rows relative to the norm of the delta.
        worst_row: Largest norm of the error of a row, relative to a row of average norm. Catches
            a wrong block of columns, which many right rows would hide.
    """

    whole: float
    worst_row: float

    def fault(self, dtype: torch.dtype, device: torch.device) -> str:
        """Say which bound is broken; nothing = none."""
        bounds = BOUNDS if device.type == "cuda" else INTERPRETED_BOUNDS
        bound = bounds[dtype]
        # Comparisons that a NaN fails.
        if not self.whole <= bound:
            return f"error {self.whole:.1e}, bound {bound:.0e}"
        if not self.worst_row <= ROW_FACTOR * bound:
            return f"error of one row {self.worst_row:.1e}, bound {ROW_FACTOR * bound:.0e}"
        return ""


def error_of(actual: Tensor, expected: Tensor, delta: Tensor) -> Error:
    """Compare outputs `[T, N]` with what they should be in fp64, by the norm of the delta.

    Where the delta is zero, so is the unit: any error at all is then infinite.
    """
    rows = torch.linalg.vector_norm(actual.double() - expected, dim=1)
    norm = torch.linalg.vector_norm(delta)
    unit = norm / max(len(delta), 1) ** 0.5
    whole, worst = torch.linalg.vector_norm(rows), rows.max()
    if not norm:
        return Error(float("inf") if whole else 0.0, float("inf") if whole else 0.0)
    return Error((whole / norm).item(), (worst / unit).item())

"""The only place where closeness is defined.

One row per dtype: relative and absolute tolerance of an element, and the bound on the norm of the
error of a delta relative to the norm of the delta itself. No test has figures of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    rtol: float
    atol: float
    delta: float


TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-12, delta=1e-12),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5, delta=1e-5),
    torch.float16: Tolerance(rtol=2e-3, atol=2e-3, delta=2e-3),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-2, delta=2e-2),
}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, *, dtype: torch.dtype | None = None
) -> None:
    """Compare elements; `dtype` is the one computed in, by default that of `actual`."""
    tolerance = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance.rtol, atol=tolerance.atol
    )


def assert_delta_close(
    actual_delta: torch.Tensor, expected_delta: torch.Tensor, dtype: torch.dtype
) -> None:
    """Compare deltas by norm, which a cancellation in single elements does not disturb.

    Semantics: ||actual - expected|| <= bound(dtype) * ||expected||; an all-zero expected delta
    must be met exactly. A value that is not finite never passes.
    """
    assert actual_delta.shape == expected_delta.shape
    expected = expected_delta.double()
    error = torch.linalg.vector_norm(actual_delta.double() - expected).item()
    limit = TOLERANCES[dtype].delta * torch.linalg.vector_norm(expected).item()
    assert error <= limit, f"error norm {error:.3e} above {limit:.3e} for {dtype}"

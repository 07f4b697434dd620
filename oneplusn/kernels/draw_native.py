"""Draw tokens from rows of logits by the compiled kernel of the CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oneplusn.kernels import native, ops

DTYPES = (torch.bfloat16, torch.float32)
ROW_ARRAYS = ("rows", "factors", "top_k", "top_p", "min_p", "uniform")


class DrawArguments(ctypes.Structure):
    """`Draw` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", *ROW_ARRAYS, "tokens")),
        *((name, ctypes.c_int64) for name in ("columns", "stride")),
        *((name, ctypes.c_int32) for name in ("count", "is_bf16")),
    )


@dataclass(frozen=True, slots=True)
class Draws:
    """How a token is drawn from each of n rows.

    Attributes:
        rows: int64 [n], which rows of the logits.
        factors: fp32 [n], what they are multiplied by, 1 / temperature.
        top_k: int64 [n]; 0 keeps everything.
        top_p: fp64 [n]; 1 keeps everything.
        min_p: fp64 [n]; 0 keeps everything.
        uniform: fp64 [n] in [0, 1), where in the cumulative distribution the token lies.
    """

    rows: npt.NDArray[np.int64]
    factors: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]
    uniform: npt.NDArray[np.float64]


def takes(logits: Tensor) -> bool:
    """Tell whether there is a compiled kernel for these logits."""
    on_cpu = logits.device.type == "cpu"
    return on_cpu and logits.dtype in DTYPES and logits.stride(-1) == 1 and ops.compiled()


def draw(logits: Tensor, draws: Draws) -> list[int]:
    """Draw a token of each row from what its filters keep.

    Semantics:
        p = softmax(logits[rows[i]] * factors[i]), of which top-k, then top-p, then min-p keep the
        largest, equal ones together; out[i] = min {j : sum(p[:j+1]) > uniform[i] * sum(p)},
        or -1 where a row holds no distribution, as all of it is -inf, or some of it NaN or inf

    A row's token does not depend on the others, nor on the number of threads.

    Args:
        logits: `[M, V]`, one that `takes` takes; not modified.
        draws: What is drawn.
    """
    tokens = np.empty(len(draws.rows), np.int64)
    arrays = [getattr(draws, name) for name in ROW_ARRAYS]
    arguments = DrawArguments(
        logits.data_ptr(),
        *[array.ctypes.data for array in (*arrays, tokens)],
        logits.shape[1],
        logits.stride(0),
        len(tokens),
        logits.dtype == torch.bfloat16,
    )
    native.required().oneplusn_draw(ctypes.byref(arguments), native.threads())
    found: list[int] = tokens.tolist()
    return found

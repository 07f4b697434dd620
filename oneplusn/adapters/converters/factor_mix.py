"""Methods that mix factors instead of outputs: one plain LoRA per task, made once.

Poly, MHR, C-Poly's published code, MTL-LoRA and LoRAHub compute

    delta = s * (sum over skills e of w[task, e] B_e) (sum over skills e of w[task, e] A_e) x

which is no gated sum of experts: it has a term B_i A_j for every pair of skills. Their weights w
are fixed per task, so both sums can be taken before anything is served. Exact, at rank r per task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.errors import AdapterInvalid

MAX_MIXED_BYTES = 4 << 30
"""Most bytes of the mixed factors: n_tasks is a number in a file, and each task costs a LoRA."""

FP32_BYTES = 4


class Mixed(NamedTuple):
    """The factors of all tasks at one module: A [J, r, K] and B [J, N, r], fp32."""

    a: Tensor
    b: Tensor


def mix_splits(a: Tensor, b: Tensor, weights: Tensor) -> Mixed:
    """Mix the skills of a module for every task, block by block.

    Semantics:
        A[j] = concat over splits q of sum over s of weights[j, q, s] * a[q, s]   (rows of x)
        B[j] = concat over splits q of sum over s of weights[j, q, s] * b[q, s]   (columns of y)
        Poly (arXiv 2202.13914) with one split, MHR (arXiv 2211.03831) with more.

    Args:
        a: [q, S, K / q, r], any float.
        b: [q, S, r, N / q], any float.
        weights: [J, q, S] fp32.
    """
    mixed_a = torch.einsum("jqs,qskr->jrqk", weights, a.float()).flatten(2)
    mixed_b = torch.einsum("jqs,qsrn->jqnr", weights, b.float()).flatten(1, 2)
    return Mixed(mixed_a, mixed_b)


def check_size(num_tasks: int, rank: int, widths: Mapping[str, int]) -> None:
    """Refuse what would take too much memory once it is mixed.

    Args:
        num_tasks: J.
        rank: r.
        widths: module path -> K + N.

    Raises:
        AdapterInvalid: `adapter_limit_exceeded`.
    """
    size = FP32_BYTES * num_tasks * rank * sum(widths.values())
    if size > MAX_MIXED_BYTES:
        raise AdapterInvalid(
            f"{num_tasks} tasks of rank {rank} at {len(widths)} modules take {size} bytes once"
            f" their factors are mixed, and the limit is {MAX_MIXED_BYTES}; convert fewer tasks",
            code="adapter_limit_exceeded",
        )


def one_lora_per_task(
    method: str,
    tasks: tuple[str, ...],
    modules: Mapping[str, Mixed],
    *,
    scale: float,
    metadata: Mapping[str, str],
) -> Bundle:
    """Make a bundle in which every task has one own expert and gates it by 1."""
    ranks = {path: mixed.a.shape[1] for path, mixed in modules.items()}
    rank = max(ranks.values())
    return Bundle(
        method=method,
        tasks=tasks,
        experts=tuple(Expert(task, "own", task, rank) for task in tasks),
        modules={
            path: ModuleDelta(
                a=mixed.a.flatten(0, 1),
                b=mixed.b.transpose(0, 1).flatten(1),
                ranks=(ranks[path],) * len(tasks),
                gate=torch.eye(len(tasks)),
                scale=torch.full((len(tasks),), scale),
            )
            for path, mixed in modules.items()
        },
        metadata=metadata,
    )

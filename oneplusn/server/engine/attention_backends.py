"""Who computes attention over the KV cache: a table, and what each backend can do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from oneplusn.kernels import attention_reference, cpu_attention

# Keys and values of heads up to this size, in these dtypes, are what the Triton kernels hold.
TRITON_DIM = 256
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_log = logging.getLogger("oneplusn.engine")


class Attention(NamedTuple):
    """What a backend computes; `attention_reference` says what it means.

    Attributes:
        write_kv: Stores a step's keys and values.
        paged_attention: Attends from a step's rows.
    """

    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: Callable[..., Tensor]


class Backend(NamedTuple):
    """Who can compute attention over the caches of some layers.

    Attributes:
        name: For logs.
        why_not: Says why it cannot attend over all of them; nothing = it can.
        load: Imports it.
    """

    name: str
    why_not: Callable[[Sequence[Tensor]], str]
    load: Callable[[], Attention]


def _why_not_triton(caches: Sequence[Tensor]) -> str:
    forced, device = os.environ.get("ONEPLUSN_KERNELS"), caches[0].device.type
    interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not interpreted:
        return "on the CPU it takes ONEPLUSN_KERNELS=triton and TRITON_INTERPRET=1"
    if device not in {"cpu", "cuda"}:
        return f"it does not know the device {device!r}"
    if forced not in {None, "", "triton"}:
        return f"ONEPLUSN_KERNELS is {forced!r}"
    if caches[0].dtype not in TRITON_DTYPES:
        return f"it does not know {caches[0].dtype}"
    dim = max(each.shape[2] for each in caches)
    if dim > TRITON_DIM:
        return f"heads have {dim} columns, the limit is {TRITON_DIM}"
    return ""


def _triton() -> Attention:
    from oneplusn.kernels import triton_attention_backend as triton

    return Attention(triton.write_kv, triton.paged_attention)


def _why_not_cpu(caches: Sequence[Tensor]) -> str:
    device = caches[0].device.type
    return "" if device == "cpu" else f"the cache is on {device!r}"


def _cpu() -> Attention:
    return Attention(cpu_attention.write_kv, cpu_attention.paged_attention)


def _reference() -> Attention:
    return Attention(attention_reference.write_kv, attention_reference.paged_attention)


# The first that can do it does it.
BACKENDS = (
    Backend("triton", _why_not_triton, _triton),
    Backend("cpu", _why_not_cpu, _cpu),
    Backend("reference", lambda caches: "", _reference),
)


def choose(caches: Sequence[Tensor]) -> Backend:
    """Return the best backend that can attend over all of some caches."""
    reasons = []
    for backend in BACKENDS:
        reason = backend.why_not(caches)
        if not reason:
            break
        reasons.append(f"{backend.name}: {reason}")
    if backend.name == "reference":
        _log.warning("attention runs row by row, which is slow: %s", "; ".join(reasons))
    return backend

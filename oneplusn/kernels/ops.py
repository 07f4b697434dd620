"""The public ops, and the choice of who computes them.

A backend is chosen once per device type. `ONEPLUSN_KERNELS` forces one by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, Protocol

import torch

from oneplusn.errors import ConfigError
from oneplusn.kernels.plan import Plan, Site


class GatedDelta(Protocol):
    """What a backend offers; `gated_delta` below says what it means."""

    def __call__(
        self,
        ys: Sequence[torch.Tensor],
        x: torch.Tensor,
        site: Site,
        plan: Plan,
        *,
        into: Literal["y", "delta"] = "y",
    ) -> None:
        """Compute the delta in place."""


def _best_of_cpu() -> GatedDelta:
    from oneplusn.kernels import native

    return _native() if native.loaded() else _torch()


def _native() -> GatedDelta:
    from oneplusn.kernels import cpu_native, native

    if native.loaded() is None:
        msg = (
            "ONEPLUSN_KERNELS='native' needs a C++ compiler that works, and the log says what "
            "failed here; install g++, or set ONEPLUSN_KERNELS='torch'"
        )
        raise ConfigError(msg)
    return cpu_native.gated_delta


def _torch() -> GatedDelta:
    from oneplusn.kernels import cpu

    return cpu.gated_delta


def _reference() -> GatedDelta:
    from oneplusn.kernels import reference

    return reference.gated_delta


def _triton() -> GatedDelta:
    from oneplusn.kernels import triton_backend

    return triton_backend.gated_delta


def _interpreted_triton() -> GatedDelta:
    if os.environ.get("TRITON_INTERPRET") != "1":
        msg = (
            "ONEPLUSN_KERNELS='triton' on 'cpu' runs the kernels in Triton's interpreter, a "
            "thousand times slower; set TRITON_INTERPRET=1 too if that is what you want"
        )
        raise ConfigError(msg)
    return _triton()


# Per device type by name, the default first; imported when chosen. Other devices: the reference.
_BACKENDS: dict[str, dict[str, Callable[[], GatedDelta]]] = {
    "cpu": {
        "cpu": _best_of_cpu,
        "native": _native,
        "torch": _torch,
        "reference": _reference,
        "triton": _interpreted_triton,
    },
    "cuda": {"triton": _triton, "reference": _reference},
}
_ELSEWHERE: dict[str, Callable[[], GatedDelta]] = {"reference": _reference}


def compiled() -> bool:
    """Tell whether the CPU computes with the compiled kernels."""
    return backend("cpu").__module__ == "oneplusn.kernels.cpu_native"


@cache
def backend(device_type: str) -> GatedDelta:
    """Choose the backend of a device type.

    Raises:
        ConfigError: When ONEPLUSN_KERNELS names none of this device type.
    """
    choices = _BACKENDS.get(device_type, _ELSEWHERE)
    name = os.environ.get("ONEPLUSN_KERNELS") or next(iter(choices))
    if name not in choices:
        msg = (
            f"ONEPLUSN_KERNELS={name!r} is no backend for {device_type!r}: "
            f"set it to one of {', '.join(choices)}, or unset it"
        )
        raise ConfigError(msg)
    return choices[name]()


def gated_delta(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    site: Site,
    plan: Plan,
    *,
    into: Literal["y", "delta"] = "y",
) -> None:
    """Compute a site's gated experts for every adapted row, in place. Inference only.

    Semantics:
        delta[s][t] = sum over the runs u of row t and their rank rows e of
                      gate[t, e] * (A[e, s] . x[t]) * B[e, columns of s]
        x: `[T, K]`; ys[s]: `[T, N_s]` for each slice s, both in the dtype of the pages; gates:
        fp32, with the scale folded in. Rows may lie apart; the columns of one lie side by side.
        into="y": ys[s][t] += delta[s][t]; rows without adapter keep every bit.
        into="delta": ys[s][t] = delta[s][t], zero for rows without adapter, whatever was there.
        The shrunken rows A x may round to the compute dtype before and after the gate; in fp32
        nothing rounds below fp32. Rank rows beyond the end of a run, and pages of no active run,
        may hold anything.

    Args:
        ys: One output per slice of the site.
        x: What the site's linears read.
        site: The resident experts.
        plan: The step's grouping of the T rows.
        into: Whether outputs are added to, or overwritten.
    """
    assert len(ys) == site.spec.num_slices, site.spec
    assert x.shape == (plan.num_rows, site.spec.in_features), (x.shape, site.spec)
    backend(x.device.type)(ys, x, site, plan, into=into)

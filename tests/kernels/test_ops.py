"""Who computes an op: one choice per device type, which the environment can force."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from oneplusn.errors import ConfigError
from oneplusn.kernels import cpu, cpu_native, native, ops, reference, triton_backend
from oneplusn.kernels.plan import build_plan
from site_builder import Cluster, build_world
from tolerances import assert_delta_close


@pytest.fixture(autouse=True)
def _forget_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ONEPLUSN_KERNELS", raising=False)
    ops.backend.cache_clear()
    yield
    ops.backend.cache_clear()


@pytest.mark.parametrize(
    ("forced", "device", "expected"),
    [
        (None, "cpu", cpu_native.gated_delta),
        ("", "cpu", cpu_native.gated_delta),
        ("cpu", "cpu", cpu_native.gated_delta),
        ("native", "cpu", cpu_native.gated_delta),
        ("torch", "cpu", cpu.gated_delta),
        ("triton", "cpu", triton_backend.gated_delta),
        (None, "cuda", triton_backend.gated_delta),
        ("reference", "cpu", reference.gated_delta),
        (None, "meta", reference.gated_delta),
    ],
)
def test_backend_of(
    forced: str | None, device: str, expected: ops.GatedDelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced is not None:
        monkeypatch.setenv("ONEPLUSN_KERNELS", forced)
    assert ops.backend(device) is expected


def test_without_a_compiler_the_slabs_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "loaded", lambda: None)
    assert ops.backend("cpu") is cpu.gated_delta


def test_the_compiled_kernel_cannot_be_forced_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "loaded", lambda: None)
    monkeypatch.setenv("ONEPLUSN_KERNELS", "native")
    with pytest.raises(ConfigError, match=r"install g\+\+, or set ONEPLUSN_KERNELS='torch'"):
        ops.backend("cpu")


@pytest.mark.parametrize(
    ("forced", "device", "choices"),
    [
        ("cuda", "cpu", "cpu, native, torch, reference, triton"),
        ("cpu", "cuda", "triton, reference"),
        ("cpu", "meta", "reference"),
    ],
)
def test_an_unknown_backend_is_refused_with_the_choices(
    forced: str, device: str, choices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEPLUSN_KERNELS", forced)
    with pytest.raises(ConfigError, match=f"'{forced}' is no backend .* one of {choices},"):
        ops.backend(device)


def test_the_first_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ops.backend("cpu")
    monkeypatch.setenv("ONEPLUSN_KERNELS", "reference")
    assert ops.backend("cpu") is first


def test_triton_on_a_cpu_says_that_it_is_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEPLUSN_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="set TRITON_INTERPRET=1 too"):
        ops.backend("cpu")


@pytest.mark.parametrize("forced", ["cpu", "reference", "triton"])
def test_the_op_computes_with_the_backend(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEPLUSN_KERNELS", forced)
    world = build_world([Cluster((4,), ((3,),))])
    x, y = torch.randn(2, world.site.spec.in_features), torch.zeros(2, 16)

    ops.gated_delta([y], x, world.site, build_plan([0, 1], world.slots))

    assert_delta_close(y, world.delta([0, 1], x), torch.float32)
    assert not y[0].any()

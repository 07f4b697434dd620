"""Gates are read from the files as the bundle holds them."""

from __future__ import annotations

import pytest

from bundles import MODULE, small_bundle
from oneplusn.adapters.files import write_bundle
from oneplusn.server.gates import read_gates
from random_bundles import make_bundle


def test_the_experts_of_one_task(tmp_path) -> None:
    write_bundle(small_bundle(tasks=("a", "b", "c")), tmp_path / "blob")

    gates = read_gates(tmp_path / "blob", "b")

    assert gates.experts == ("shared", "own-b")
    assert gates.modules == {MODULE: (0.5, 1.0)}


@pytest.mark.parametrize("seed", range(3))
def test_they_are_gate_times_scale(tmp_path, seed) -> None:
    shapes = {"a.q_proj": (8, 6), "a.down_proj": (4, 8)}
    tasks = ("x", "y", "z")
    bundle = make_bundle(shapes, seed=seed, tasks=tasks, common=(2, 1), gates_differ=True)
    write_bundle(bundle, tmp_path / "blob")

    for row, task in enumerate(tasks):
        gates = read_gates(tmp_path / "blob", task)
        assert gates.experts == ("c0", "c1", f"own-{task}")
        for path, delta in bundle.modules.items():
            weights = delta.weights[row].tolist()
            named = dict(zip([e.name for e in bundle.experts], weights, strict=True))
            told = dict(zip(gates.experts, gates.modules[path], strict=True))
            assert told == pytest.approx({name: named.pop(name) for name in told})
            assert not any(named.values())

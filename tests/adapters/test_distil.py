"""A blend as one LoRA: exact at full rank, the least error at a smaller one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edit_samples import clusters, few, pair
from oneplusn.adapters import edits
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.distil import distil
from oneplusn.errors import AdapterNotFound, InvalidRequest
from random_bundles import delta_weight, make_bundle
from tolerances import assert_close


def blend_weight(bundle: Bundle, weights: dict[str, float], path: str) -> torch.Tensor:
    parts = [weight * delta_weight(bundle, task, path) for task, weight in weights.items()]
    return torch.stack(parts).sum(0)


@few
@given(clusters("a"), st.lists(st.floats(0.1, 2), min_size=1, max_size=4))
def test_a_blend_becomes_one_lora_exactly(bundle, numbers):
    weights = dict(zip(bundle.tasks, numbers, strict=False))
    one, errors = distil(bundle, weights, task="one")
    assert [expert.name for expert in one.experts] == ["one"]
    assert one.base == bundle.base
    for path in bundle.modules:
        expected = blend_weight(bundle, weights, path)
        if path in one.modules:
            assert_close(delta_weight(one, "one", path), expected, dtype=torch.float32)
            assert errors[path] < torch.finfo(torch.float32).eps
        else:
            assert_close(expected, torch.zeros_like(expected))


@few
@given(seed=st.integers(0, 999), rank=st.integers(1, 6))
def test_the_error_of_a_cut_is_the_least_that_its_rank_allows(seed, rank):
    shapes = {"layers.0.q": (9, 7), "layers.0.o": (6, 8)}
    bundle = make_bundle(
        shapes, seed=seed, tasks=["a", "b"], common=(2,), own={"a": 3, "b": 1}, gates_differ=True
    )
    weights = {"a": 0.75, "b": -1.25}
    cut, errors = distil(bundle, weights, task="one", rank=rank)
    for path in shapes:
        whole = blend_weight(bundle, weights, path)
        values = torch.linalg.svdvals(whole)
        least = values[rank:].square().sum().sqrt() / values.square().sum().sqrt()
        assert_close(torch.tensor(errors[path]), least, dtype=torch.float32)
        found = delta_weight(cut, "one", path)
        assert torch.linalg.matrix_rank(found, rtol=1e-6) == min(rank, 6)
        error = torch.linalg.matrix_norm(found - whole) / torch.linalg.matrix_norm(whole)
        assert_close(error, torch.tensor(errors[path], dtype=torch.float64), dtype=torch.float32)
        assert len(cut.modules[path].a) == rank


def test_the_error_counts_the_rounding_of_the_factors():
    bundle = make_bundle({"layers.0.q": (9, 7)}, seed=0, tasks=["a"], own={"a": 3})
    cut, errors = distil(bundle, {"a": 1.0}, task="one", rank=3, dtype=torch.bfloat16)
    whole = delta_weight(bundle, "a", "layers.0.q")
    error = torch.linalg.matrix_norm(delta_weight(cut, "one", "layers.0.q") - whole)
    assert cut.modules["layers.0.q"].a.dtype == torch.bfloat16
    assert_close(
        torch.tensor(errors["layers.0.q"], dtype=torch.float64),
        error / torch.linalg.matrix_norm(whole),
        dtype=torch.float32,
    )
    assert errors["layers.0.q"] > 1e-4


REFUSED = {
    "distil an unknown task": (
        lambda: distil(pair(), {"mul": 1.0}, task="one"),
        AdapterNotFound,
        "'mul'",
    ),
    "distil to no rank": (
        lambda: distil(pair(), {"add": 1.0}, task="one", rank=0),
        InvalidRequest,
        "rank 0",
    ),
    "distil what cancels": (
        lambda: distil(
            edits.add_task(pair(), "less", edits.blended_gates(pair(), {"add": -1.0})),
            {"add": 1.0, "less": 1.0},
            task="none",
        ),
        InvalidRequest,
        "adds nothing",
    ),
}


@pytest.mark.parametrize(("make", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_distilled_is_refused(make, error, says):
    with pytest.raises(error) as refusal:
        make()
    assert says in str(refusal.value)

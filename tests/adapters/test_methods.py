"""Methods: what each makes of a cluster's tasks, and the torch form of the delta."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods import METHODS, CgcLora, CPoly, LoraPerTask
from oneplusn.adapters.methods.base import ExpertDelta
from tolerances import assert_close

TASKS = ("add", "sort", "largest")


def gate_rows(method, seed=0):
    torch.manual_seed(seed)
    return method.gate(method.shared())()


def expert_delta(ranks, in_features, out_features, *, seed=0):
    torch.manual_seed(seed)
    experts = [Expert(f"e{i}", "common", None, rank) for i, rank in enumerate(ranks)]
    delta = ExpertDelta(in_features, out_features, experts, torch.rand(len(ranks)) + 0.5)
    with torch.no_grad():
        delta.b.normal_()
    return delta


@pytest.mark.parametrize(
    ("method", "experts"),
    [
        (
            LoraPerTask(TASKS, rank=8),
            [("add", "add", 8), ("sort", "sort", 8), ("largest", "largest", 8)],
        ),
        (
            CgcLora(TASKS, num_common=2, num_own=1, rank=4, own_rank=2),
            [
                ("common-0", None, 4),
                ("common-1", None, 4),
                ("add-0", "add", 2),
                ("sort-0", "sort", 2),
                ("largest-0", "largest", 2),
            ],
        ),
        (
            CPoly(TASKS[:2], num_common=1, num_own=2, rank=3),
            [
                ("common-0", None, 3),
                ("add-0", "add", 3),
                ("add-1", "add", 3),
                ("sort-0", "sort", 3),
                ("sort-1", "sort", 3),
            ],
        ),
    ],
    ids=["lora", "cgc-lora", "c-poly"],
)
def test_experts_of_a_method(method, experts):
    assert [(e.name, e.owner, e.rank) for e in method.experts()] == experts
    assert len(method.scales()) == len(experts)
    assert gate_rows(method).shape == (method.num_tasks, len(experts))


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (LoraPerTask(TASKS, rank=8), 1.0),
        (LoraPerTask(TASKS, rank=8, alpha=16), 2.0),
        (CgcLora(TASKS, num_common=4, num_own=1), 5.0),
        (CgcLora(TASKS, scale=1.5), 1.5),
        (CPoly(TASKS), 1.0),
    ],
    ids=["lora", "lora alpha", "cgc counts its active experts", "cgc set", "c-poly"],
)
def test_scales(method, scale):
    assert set(method.scales().tolist()) == {scale}


def test_every_method_has_its_name_in_the_table():
    assert {name: method.name for name, method in METHODS.items()} == {n: n for n in METHODS}


def test_cgc_gates_are_a_softmax_over_common_and_own_experts():
    method = CgcLora(TASKS, num_common=2, num_own=1)
    rows = gate_rows(method)
    assert_close(rows.sum(dim=1), torch.ones(3))
    others = torch.tensor(
        [[e.owner not in (None, task) for e in method.experts()] for task in TASKS]
    )
    assert rows[others].eq(0).all()
    assert rows[~others].gt(0).all()


def test_cpoly_starts_uniform_on_the_common_skills_and_at_one_on_its_own():
    method = CPoly(TASKS, num_common=4, num_own=1)
    rows = gate_rows(method)
    assert torch.allclose(rows[:, :4], torch.full((3, 4), 0.25), atol=1e-3)
    assert rows[:, 4:].equal(torch.eye(3))


def test_cpoly_borrows_only_where_it_may():
    method = CPoly(TASKS, num_common=1, borrows={"largest": ("sort",)})
    gate = method.gate(None)
    with torch.no_grad():
        gate.specific.fill_(-0.5)
    assert gate()[:, 1:].tolist() == [[-0.5, 0, 0], [0, -0.5, 0], [0, -0.5, -0.5]]


def test_cpoly_noise_is_for_training_only():
    method = CPoly(TASKS, noise=True)
    gate = method.gate(None)
    assert not gate().equal(gate())
    assert_close(gate()[:, :3].sum(dim=1), torch.ones(3))
    gate.eval()
    assert gate().equal(gate())


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    sequences=st.integers(1, 4),
    tokens=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_torch_form_is_the_formula(ranks, sequences, tokens, seed):
    delta = expert_delta(ranks, 6, 5, seed=seed)
    x = torch.randn(sequences, tokens, 6)
    gates = torch.randn(sequences, len(ranks))
    expected = torch.zeros(sequences, tokens, 5, dtype=torch.float64)
    scales = [float(delta.scale[delta.rank_expert == e][0]) for e in range(len(ranks))]
    for row in range(sequences):
        start = 0
        for e, rank in enumerate(ranks):
            a = delta.a[start : start + rank].double()
            b = delta.b[:, start : start + rank].double()
            expected[row] += gates[row, e].double() * scales[e] * (x[row].double() @ a.T @ b.T)
            start += rank
    assert_close(delta(x, gates).double(), expected, dtype=torch.float32)


def test_gradients_of_the_torch_form():
    delta = expert_delta([2, 1], 3, 4).double()
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(delta, (x, gates))
    assert torch.autograd.gradcheck(
        lambda a, b: torch.func.functional_call(
            delta, {"a": a, "b": b}, (x.detach(), gates.detach())
        ),
        (delta.a.detach().requires_grad_(), delta.b.detach().requires_grad_()),
    )


def test_an_untrained_cluster_changes_nothing():
    method = CgcLora(TASKS)
    delta = ExpertDelta(6, 5, method.experts(), method.scales())
    assert delta(torch.randn(3, 2, 6), gate_rows(method)).eq(0).all()

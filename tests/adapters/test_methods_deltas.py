"""The torch form of the deltas: the formulas, their gradients, and what is exported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.func import functional_call

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods import CgcLora, CPoly, Mhr, MoeLora, Poly
from oneplusn.adapters.methods.base import ExpertDelta, FactorDelta
from tolerances import assert_close

TASKS = ("add", "sort", "largest")


def expert_delta(ranks, in_features, out_features, *, seed=0):
    torch.manual_seed(seed)
    experts = [Expert(f"e{i}", "common", None, rank) for i, rank in enumerate(ranks)]
    delta = ExpertDelta(in_features, out_features, experts, torch.rand(len(ranks)) + 0.5)
    with torch.no_grad():
        delta.b.normal_()
    return delta


def factor_delta(num_splits, num_experts, rank, *, seed=0):
    torch.manual_seed(seed)
    delta = FactorDelta(
        (2 * num_splits, 3 * num_splits), num_experts, rank, num_splits=num_splits, scale=0.5
    )
    with torch.no_grad():
        delta.b.normal_()
    return delta


def summed_outputs(delta, x, gates):
    """The output mix of one row in fp64, expert by expert."""
    y = torch.zeros(delta.b.shape[0], dtype=torch.float64)
    start = 0
    for e, rank in enumerate(delta.ranks):
        a = delta.a[start : start + rank].double()
        b = delta.b[:, start : start + rank].double()
        y += gates[e].double() * delta.scales[e].double() * (b @ (a @ x.double()))
        start += rank
    return y


def mixed_factors(delta, x, weights):
    """The factor mix of one row in fp64: A and B mixed block by block, then multiplied."""
    num_splits, num_experts, rank, inputs = delta.a.shape
    a = torch.zeros(rank, num_splits * inputs, dtype=torch.float64)
    outputs = delta.b.shape[-1]
    b = torch.zeros(num_splits * outputs, rank, dtype=torch.float64)
    for q in range(num_splits):
        for e in range(num_experts):
            weight = weights[q, e].double()
            a[:, q * inputs : (q + 1) * inputs] += weight * delta.a[q, e].double()
            b[q * outputs : (q + 1) * outputs] += weight * delta.b[q, e].double().T
    return delta.scale * (b @ (a @ x.double()))


def by_hand(formula, delta, x, gates, *, per_token):
    rows = [
        [formula(delta, x[b, t], gates[b, t] if per_token else gates[b]) for t in range(x.shape[1])]
        for b in range(x.shape[0])
    ]
    return torch.stack([torch.stack(row) for row in rows])


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    sequences=st.integers(1, 3),
    tokens=st.integers(1, 3),
    per_token=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_output_mix_is_the_formula(ranks, sequences, tokens, per_token, seed):
    delta = expert_delta(ranks, 6, 5, seed=seed)
    x = torch.randn(sequences, tokens, 6)
    lead = (sequences, tokens) if per_token else (sequences,)
    gates = torch.randn(*lead, len(ranks))
    expected = by_hand(summed_outputs, delta, x, gates, per_token=per_token)
    assert_close(delta(x, gates).double(), expected, dtype=torch.float32)


@given(
    num_splits=st.integers(1, 3),
    num_experts=st.integers(1, 3),
    rank=st.integers(1, 3),
    tokens=st.integers(1, 3),
    per_token=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_factor_mix_is_the_formula(num_splits, num_experts, rank, tokens, per_token, seed):
    delta = factor_delta(num_splits, num_experts, rank, seed=seed)
    x = torch.randn(2, tokens, 2 * num_splits)
    lead = (2, tokens) if per_token else (2,)
    gates = torch.rand(*lead, num_splits, num_experts)
    expected = by_hand(mixed_factors, delta, x, gates, per_token=per_token)
    assert_close(delta(x, gates).double(), expected, dtype=torch.float32)


@pytest.mark.parametrize(
    ("delta", "x", "gates"),
    [
        (expert_delta([2, 1], 3, 4), (2, 2, 3), (2, 2)),
        (expert_delta([2, 1], 3, 4), (2, 2, 3), (2, 2, 2)),
        (factor_delta(2, 2, 1), (2, 2, 4), (2, 2, 2)),
        (factor_delta(1, 2, 2), (1, 2, 2), (1, 2, 1, 2)),
        (factor_delta(2, 2, 2), (2, 2, 4), (2, 2, 2, 2)),
    ],
    ids=["output", "output per token", "factor", "factor per token", "blocks per token"],
)
def test_gradients(delta, x, gates):
    delta = delta.double()
    x = torch.randn(x, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(gates, dtype=torch.float64, requires_grad=True)
    assert gradcheck(delta, (x, gates))
    factors = (delta.a.detach().requires_grad_(), delta.b.detach().requires_grad_())
    given_inputs = (x.detach(), gates.detach())
    assert gradcheck(lambda a, b: functional_call(delta, {"a": a, "b": b}, given_inputs), factors)


@pytest.mark.parametrize(
    "method",
    [
        CgcLora(TASKS, num_common=2, num_own=2, embedding_dim=3),
        CgcLora(TASKS, num_common=2, num_own=1, softmax="group", embedding_dim=3),
        MoeLora(TASKS, num_experts=3, embedding_dim=3),
        CPoly(TASKS, num_common=2, borrows={"add": ["sort"]}),
        CPoly(TASKS, num_common=2, mix="factor", num_splits=2),
        Poly(TASKS, num_skills=2),
    ],
    ids=["cgc", "cgc group", "moelora", "c-poly", "c-poly factor", "poly"],
)
def test_gradients_of_gates(method):
    torch.manual_seed(0)
    shared = method.shared()
    gate = method.gate(shared).double()
    if shared is not None:
        shared.double()
    names = [name for name, _ in gate.named_parameters()]
    values = tuple(p.detach().requires_grad_() for p in gate.parameters())
    assert names
    assert gradcheck(
        lambda *given: functional_call(gate, dict(zip(names, given, strict=True))), values
    )


@pytest.mark.parametrize(
    "method",
    [
        CgcLora(TASKS, num_common=2, rank=2, own_rank=1),
        CPoly(TASKS, num_common=2, rank=2, borrows="all"),
        CPoly(TASKS, num_common=2, rank=2, mix="factor", num_splits=2),
        Poly(TASKS, num_skills=3, rank=2),
        Mhr(TASKS, num_skills=3, rank=2, num_splits=2),
    ],
    ids=["cgc", "c-poly", "c-poly factor", "poly", "mhr"],
)
def test_what_is_exported_computes_the_same_for_every_task(method):
    torch.manual_seed(0)
    delta = method.delta(6, 4)
    gates = method.gate(method.shared()).eval()()
    with torch.no_grad():
        delta.b.normal_()
        x = torch.randn(len(TASKS), 2, 6)
        trained = delta(x, gates)
        module = method.export(delta, gates, torch.float32)
    assert module.gate.shape == (len(TASKS), len(method.exported_experts()))
    for task, weights in enumerate(module.weights):
        rows = weights.repeat_interleave(torch.tensor(module.ranks))
        assert_close(x[task] @ ((module.b * rows) @ module.a).T, trained[task])


def test_an_untrained_delta_is_zero():
    for method in (CgcLora(TASKS), Mhr(TASKS, num_splits=2)):
        delta = method.delta(6, 4)
        gates = method.gate(method.shared())()
        assert delta(torch.randn(3, 2, 6), gates).eq(0).all()


@pytest.mark.parametrize(
    "method",
    [CgcLora(TASKS), CPoly(TASKS, noise=True), MoeLora(TASKS), Mhr(TASKS, num_splits=2)],
    ids=lambda method: method.name,
)
def test_a_layer_never_looks_at_values(method):
    """A tensor on `meta` has none, so whatever waits for the device fails here."""
    delta = method.delta(8, 8).to("meta")
    shared = method.shared()
    gate = method.gate(shared).to("meta")
    if shared is not None:
        shared.to("meta")
    gates = gate()
    x = torch.empty(4, 3, 8, device="meta")
    task_ids = torch.empty(4, dtype=torch.int64, device="meta")
    rows = torch.nn.functional.embedding(task_ids, delta.prepare(gates)).unsqueeze(1)
    delta.mix(x, rows).sum().backward()
    assert delta.a.grad.shape == delta.a.shape

"""Budgets: what a method would train, and ranks that fit a budget."""

from __future__ import annotations

import pytest

from oneplusn.adapters.methods import CgcLora, CPoly, LoraPerTask, Mhr, MoeLora, Poly, SharedLora
from oneplusn.adapters.methods.budget import Budget, budget, match
from oneplusn.errors import InvalidRequest
from oneplusn.kernels.plan import SiteSpec

TASKS = tuple(f"task-{i}" for i in range(16))
SITES = [
    SiteSpec("0.q+k", 64, (64, 32), ("0.q", "0.k")),
    SiteSpec("0.down", 128, (64,), ("0.down",)),
]
WIDTH = 64 + 64 + 64 + 32 + 128 + 64
METHODS = [
    LoraPerTask(TASKS),
    SharedLora(TASKS),
    CgcLora(TASKS, num_common=2, num_own=2, own_rank=2),
    CgcLora(TASKS, gate_scope="model"),
    CPoly(TASKS, borrows={"task-1": ["task-0"]}),
    CPoly(TASKS, mix="factor", num_splits=2, borrows="all"),
    CPoly(TASKS, fixed_own=True),
    MoeLora(TASKS),
    MoeLora(TASKS, gate_scope="site"),
    Poly(TASKS),
    Mhr(TASKS),
]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LoraPerTask(TASKS, rank=3), Budget(16 * 3 * WIDTH, 0)),
        (SharedLora(TASKS, rank=48), Budget(48 * WIDTH, 0)),
        (
            CgcLora(TASKS, num_common=2, num_own=2, rank=4, own_rank=1, embedding_dim=8),
            Budget((2 * 4 + 32 * 1) * WIDTH, 16 * 8 + 2 * 8 * 4),
        ),
        (CPoly(TASKS, num_common=3, rank=2), Budget(19 * 2 * WIDTH, 2 * (16 * 3 + 16))),
        (MoeLora(TASKS, num_experts=8, rank=2), Budget(16 * WIDTH, 16 * 64 + 64 * 8)),
        (Mhr(TASKS, num_skills=4, rank=2), Budget(8 * WIDTH, 2 * 16 * 4 * 4)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_budgets_by_hand(method, expected):
    assert budget(method, SITES) == expected
    assert budget(method, SITES).total == expected.experts + expected.gates


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_budget_is_what_is_built(method):
    shared = method.shared()
    modules = [shared] if shared is not None else []
    modules += [method.gate(shared) for _ in (SITES if method.gate_scope == "site" else [0])]
    gates = sum(p.numel() for module in modules for p in module.parameters())
    deltas = [method.delta(site.in_features, n) for site in SITES for n in site.slices]
    experts = sum(p.numel() for delta in deltas for p in delta.parameters())
    assert budget(method, SITES) == Budget(experts, gates)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("total", [400_000, 1_600_000])
def test_a_match_is_the_closest_rank(method, total):
    matched = match(method, SITES, total)
    assert abs(budget(matched, SITES).total - total) <= 0.05 * total
    assert (matched.tasks, len(matched.experts())) == (method.tasks, len(method.experts()))
    own_rank = getattr(method, "own_rank", None)
    if own_rank is not None:
        assert matched.own_rank == round(own_rank * matched.rank / method.rank)


def test_a_match_of_its_own_budget_changes_nothing():
    for method in METHODS:
        assert match(method, SITES, budget(method, SITES).total, tolerance=0) == method


def test_a_total_that_no_rank_meets_is_refused_with_the_nearest():
    method = LoraPerTask(TASKS)
    step = 16 * WIDTH
    message = rf"lora cannot have {round(2.5 * step):,} .* rank 2 has {2 * step:,}; rank 3 has"
    with pytest.raises(InvalidRequest, match=message):
        match(method, SITES, round(2.5 * step))
    assert match(method, SITES, round(2.5 * step), tolerance=0.2).rank in (2, 3)
    with pytest.raises(InvalidRequest, match="rank 1 has"):
        match(method, SITES, 10)

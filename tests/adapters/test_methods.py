"""Methods: the experts, scales and gate rows that each makes of a cluster's tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import oneplusn
from oneplusn.adapters.methods import (
    METHODS,
    CgcLora,
    CPoly,
    LoraPerTask,
    Mhr,
    MoeLora,
    Poly,
    SharedLora,
    make_method,
)
from oneplusn.adapters.methods.settings import MEANING, declared
from oneplusn.errors import InvalidRequest
from tolerances import assert_close

TASKS = ("add", "sort", "largest")


def gate_of(method, seed=0):
    torch.manual_seed(seed)
    return method.gate(method.shared())


def rows_of(method, seed=0):
    return gate_of(method, seed).eval()()


@pytest.mark.parametrize(
    ("method", "experts"),
    [
        (
            LoraPerTask(TASKS, rank=8),
            [("add", "add", 8), ("sort", "sort", 8), ("largest", "largest", 8)],
        ),
        (SharedLora(TASKS, rank=16), [("shared", None, 16)]),
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
        (MoeLora(TASKS, num_experts=2, rank=2), [("expert-0", None, 2), ("expert-1", None, 2)]),
        (Poly(TASKS, num_skills=2, rank=2), [("skill-0", None, 2), ("skill-1", None, 2)]),
        (Mhr(TASKS, num_skills=1, rank=1), [("skill-0", None, 1)]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_experts_of_a_method(method, experts):
    assert [(e.name, e.owner, e.rank) for e in method.experts()] == experts
    assert len(method.scales()) == len(experts)
    assert rows_of(method).shape[0] == method.num_tasks
    assert rows_of(method).shape[-1] == len(experts)


@pytest.mark.parametrize(
    ("method", "scales"),
    [
        (LoraPerTask(TASKS[:1], rank=8), [1.0]),
        (LoraPerTask(TASKS[:1], rank=8, alpha=16), [2.0]),
        (SharedLora(TASKS, rank=8, alpha=2), [0.25]),
        (CgcLora(TASKS[:1], num_common=2, num_own=2), [4.0, 4.0, 4.0, 4.0]),
        (CgcLora(TASKS[:1], num_common=2, num_own=1, softmax="group"), [2.0, 2.0, 1.0]),
        (CgcLora(TASKS[:1], num_common=1, scale=1.5), [1.5, 1.5]),
        (CgcLora(TASKS[:1], num_common=1, rank=4, own_rank=2, alpha=8), [2.0, 4.0]),
        (CPoly(TASKS[:1], num_common=1), [1.0, 1.0]),
        (CPoly(TASKS[:1], num_common=1, mix="factor", rank=4), [0.25, 0.25]),
        (MoeLora(TASKS, num_experts=2, rank=4), [2.0, 2.0]),
        (MoeLora(TASKS, num_experts=2, rank=4, alpha=32), [4.0, 4.0]),
        (Poly(TASKS, num_skills=2, rank=4), [0.25, 0.25]),
        (Poly(TASKS, num_skills=2, rank=4, alpha=4), [1.0, 1.0]),
    ],
    ids=[
        "lora",
        "lora alpha",
        "shared alpha",
        "cgc counts the experts of its softmax",
        "cgc of each group",
        "cgc set",
        "cgc alpha over each rank",
        "c-poly",
        "c-poly factor mix",
        "moelora counts its experts",
        "moelora alpha over the total rank",
        "poly",
        "poly alpha",
    ],
)
def test_scales(method, scales):
    assert method.scales().tolist() == scales


def test_every_method_has_its_name_in_the_table():
    assert {name: method.name for name, method in METHODS.items()} == {n: n for n in METHODS}
    assert all(method.summary for method in METHODS.values())


def test_the_page_of_methods_names_every_setting():
    page = (Path(oneplusn.__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
    for method in METHODS.values():
        for name, entry in declared(method).items():
            assert entry.metadata[MEANING]
            assert f"`{name}`" in page, f"{name} of {method.name}"
        assert f"`{method.name}`" in page


def others(method):
    return torch.tensor(
        [[e.owner not in (None, task) for e in method.experts()] for task in method.tasks]
    )


@pytest.mark.parametrize("num_own", [1, 2])
def test_cgc_gates_are_a_softmax_over_common_and_own_experts(num_own):
    method = CgcLora(TASKS, num_common=2, num_own=num_own)
    rows = rows_of(method)
    assert_close(rows.sum(dim=1), torch.ones(3))
    assert rows[others(method)].eq(0).all()
    assert rows[~others(method)].gt(0).all()
    assert not torch.allclose(rows[0, :2], rows[1, :2]), "tasks differ from the start"


def test_cgc_gates_with_a_softmax_for_each_group():
    method = CgcLora(TASKS, num_common=2, num_own=2, softmax="group")
    rows = rows_of(method)
    assert_close(rows[:, :2].sum(dim=1), torch.ones(3))
    assert_close(rows[:, 2:].sum(dim=1), torch.ones(3))
    assert rows[others(method)].eq(0).all()


def test_cgc_gates_are_the_formula():
    method = CgcLora(TASKS, num_common=2, num_own=1)
    shared = method.shared()
    gate = method.gate(shared)
    for row, emb in enumerate(shared.weight):
        expected = torch.softmax(gate.softmax.project.weight @ emb, dim=0)
        assert_close(gate()[row, [0, 1, 2 + row]], expected)


@pytest.mark.parametrize("scope", ["site", "model"])
def test_gates_per_site_or_per_model(scope):
    assert CgcLora(TASKS, gate_scope=scope).gate_scope == scope
    assert MoeLora(TASKS, gate_scope=scope).gate_scope == scope


def test_moelora_gates_are_a_softmax_over_all_experts():
    rows = rows_of(MoeLora(TASKS, num_experts=4))
    assert rows.shape == (3, 4)
    assert_close(rows.sum(dim=1), torch.ones(3))
    assert rows.gt(0).all()


def test_moelora_experts_start_normal_as_in_its_code():
    torch.manual_seed(0)
    assert MoeLora(TASKS).delta(400, 2).a.std().item() == pytest.approx(0.01, rel=0.05)
    assert MoeLora(TASKS, init_std=None).delta(400, 2).a.abs().max() <= 400**-0.5


def test_cpoly_starts_uniform_on_the_common_skills_and_at_one_on_its_own():
    rows = rows_of(CPoly(TASKS, num_common=4, num_own=1))
    assert torch.allclose(rows[:, :4], torch.full((3, 4), 0.25), atol=1e-3)
    assert rows[:, 4:].equal(torch.eye(3))


@pytest.mark.parametrize(
    ("borrows", "expected"),
    [
        ("none", [[-0.5, 0, 0], [0, -0.5, 0], [0, 0, -0.5]]),
        ("all", [[-0.5, -0.5, -0.5]] * 3),
        ({"largest": ["sort"]}, [[-0.5, 0, 0], [0, -0.5, 0], [0, -0.5, -0.5]]),
    ],
    ids=["none", "all", "some"],
)
def test_cpoly_borrows_only_where_it_may(borrows, expected):
    gate = gate_of(CPoly(TASKS, num_common=1, borrows=borrows))
    with torch.no_grad():
        gate.specific.fill_(-0.5)
    assert gate()[:, 1:].tolist() == expected
    gate()[:, 1:].sum().backward()
    assert gate.specific.grad.eq(1).all(), "no weight that cannot move"


def test_cpoly_simple_keeps_its_own_skills_one_hot():
    gate = gate_of(CPoly(TASKS, num_common=2, fixed_own=True))
    assert {name for name, _ in gate.named_parameters()} == {"common"}
    assert gate()[:, 2:].equal(torch.eye(3))


def test_cpoly_of_mixed_factors_has_common_weights_for_every_block():
    method = CPoly(TASKS, num_common=2, mix="factor", num_splits=4)
    rows = rows_of(method)
    assert rows.shape == (3, 4, 5)
    assert_close(rows[..., :2].sum(-1), torch.ones(3, 4))
    assert rows[..., 2:].equal(torch.eye(3).unsqueeze(1).expand(3, 4, 3))


@pytest.mark.parametrize(
    "counts",
    [{"num_common": 0}, {"num_own": 0}],
    ids=["no common", "no own"],
)
@pytest.mark.parametrize("cls", [CgcLora, CPoly])
def test_either_group_may_be_empty(cls, counts):
    method = cls(TASKS, **counts)
    gate = gate_of(method)
    assert gate().shape == (3, len(method.experts()))
    assert all(parameter.numel() for parameter in gate.parameters())


@pytest.mark.parametrize("method", [CPoly(TASKS, noise=True), Poly(TASKS, noise=True)])
def test_noise_is_for_training_only(method):
    gate = gate_of(method)
    assert not gate().equal(gate())
    common = gate()[..., : 3 if isinstance(method, CPoly) else 4]
    assert_close(common.sum(dim=-1), torch.ones(common.shape[:-1]))
    gate.eval()
    assert gate().equal(gate())


def test_a_draw_is_what_a_relaxed_bernoulli_draws():
    gate = gate_of(Poly(TASKS[:1], num_skills=2, noise=True, temperature=0.5))
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([[[2.0, -2.0]]]))
    drawn = torch.stack([gate()[0, 0] for _ in range(4000)])
    relaxed = torch.distributions.RelaxedBernoulli(
        torch.tensor(0.5), logits=torch.tensor([2.0, -2.0])
    )
    samples = relaxed.sample((4000,))
    expected = samples / samples.sum(-1, keepdim=True)
    assert torch.allclose(drawn.mean(0), expected.mean(0), atol=0.02)
    assert torch.allclose(drawn.std(0), expected.std(0), atol=0.02)


def test_straight_through_rounds_the_draw_and_lets_gradients_pass():
    gate = gate_of(Poly(TASKS, num_skills=3, noise=True, straight_through=True))
    seen = set()
    for _ in range(100):
        rows = gate()
        seen |= {tuple(round(w, 4) for w in row) for row in rows[:, 0].tolist()}
        rows.square().sum().backward()
    assert seen == {
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 0.0),
        (0.0, 1.0, 0.0),
        (0.0, 0.0, 1.0),
        (0.5, 0.5, 0.0),
        (0.5, 0.0, 0.5),
        (0.0, 0.5, 0.5),
        (0.3333, 0.3333, 0.3333),
    }
    assert 0 < gate.logits.grad.abs().max() < 100, "of 100 backward passes; finite at empty rows"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_by_name(name):
    method = make_method(name, list(TASKS), {"rank": 3, "dropout": 0.1})
    assert (type(method), method.tasks, method.rank) == (METHODS[name], TASKS, 3)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("moe", {}, "method 'moe' is unknown; known: cgc-lora, c-poly, moelora, poly, mhr, lora"),
        ("lora", {"ranks": 4}, "lora has no setting 'ranks'; it has rank, alpha, scale, dropout"),
        ("lora", {"tasks": []}, "lora has no setting 'tasks'"),
        ("lora", {"rank": 0}, "rank is 0; it is a whole number from 1 to 4096"),
        ("lora", {"rank": 4.0}, r"rank is 4\.0; it is a whole number"),
        ("lora", {"rank": True}, "rank is True; it is a whole number"),
        ("lora", {"alpha": -1}, "alpha is -1; it is a number above 0 and below 10000, or null"),
        ("lora", {"alpha": float("nan")}, "alpha is nan; it is a number"),
        ("lora", {"alpha": 1, "scale": 2}, "alpha is 1 and scale is 2; set one"),
        ("lora", {"dropout": 1}, "dropout is 1; it is a number from 0 up to, but not, 1"),
        ("cgc-lora", {"num_common": 0, "num_own": 0}, "0 experts; a cluster has 1 to 4096"),
        ("cgc-lora", {"num_common": -1}, "num_common is -1"),
        ("cgc-lora", {"softmax": "both"}, "softmax is 'both'; it is one of joint, group"),
        ("cgc-lora", {"gate_scope": "layer"}, "gate_scope is 'layer'; it is one of site, model"),
        ("c-poly", {"noise": 1}, "noise is 1; it is true or false"),
        ("c-poly", {"straight_through": True}, "set noise: true as well"),
        ("c-poly", {"borrows": True}, "it is none, all, or a map of task to list of tasks"),
        ("c-poly", {"borrows": {"add": "sort"}}, "'add' borrows from is a list of tasks"),
        ("c-poly", {"borrows": {"add": ["fly"]}}, "'fly' is no task of this cluster: add, sort"),
        ("c-poly", {"borrows": "all", "fixed_own": True}, "nothing can be borrowed"),
        ("c-poly", {"num_splits": 2}, "blocks are of the factor mix only; set mix: factor"),
        ("c-poly", {"mix": "factor", "own_rank": 2}, "have one rank, here 4"),
        ("mhr", {"num_splits": 0}, "num_splits is 0"),
    ],
)
def test_a_bad_setting_is_refused(name, settings, reason):
    with pytest.raises(InvalidRequest, match=reason):
        make_method(name, TASKS, settings)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ((), "0 tasks; a cluster has 1 to 4096"),
        (("a", "b", "a"), "task 'a' is listed twice"),
        (("A b",), "task 'A b': a name is 1 to 64"),
        (("common",), "task 'common' makes an expert named 'common-0', which is taken"),
        (("a" * 64,), "over 64 characters; rename the task"),
    ],
    ids=["none", "twice", "no name", "taken", "too long"],
)
def test_bad_tasks_are_refused(tasks, reason):
    with pytest.raises(InvalidRequest, match=reason):
        CgcLora(tasks)


def test_blocks_must_divide_the_width_of_every_linear():
    method = Mhr(TASKS, num_splits=4)
    method.delta(8, 12)
    with pytest.raises(InvalidRequest, match="num_splits is 4, and a linear of 8 inputs and 10"):
        method.delta(8, 10)


@pytest.mark.parametrize(
    "method",
    [
        CgcLora(TASKS, num_common=2, num_own=2),
        CgcLora(TASKS, num_common=2, num_own=2, softmax="group"),
        CgcLora(TASKS, num_common=2, num_own=0),
        MoeLora(TASKS, num_experts=3),
        CPoly(TASKS, num_common=3, num_own=2, borrows="all"),
        CPoly(TASKS, num_common=0, borrows={"add": ["sort"]}),
        CPoly(TASKS, num_common=2, mix="factor", num_splits=2),
        Poly(TASKS, num_skills=3),
        LoraPerTask(TASKS),
        SharedLora(TASKS),
    ],
    ids=lambda method: method.name,
)
def test_gates_can_be_set_to_rows_that_the_method_can_have(method):
    first, second = gate_of(method, 0), gate_of(method, 1)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn_like(parameter))
    second.load(first().detach())
    assert_close(second(), first())

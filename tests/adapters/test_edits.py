"""Edits without training: what they make, and that nothing else changes by a bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_samples import delta
from edit_samples import SHAPES, clusters, few, pair
from oneplusn.adapters import edits
from oneplusn.adapters.bundle import Bundle, Expert
from oneplusn.errors import (
    AdapterExists,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    InvalidRequest,
)
from random_bundles import make_bundle
from tolerances import assert_close


def contribution(bundle: Bundle, task: str, path: str) -> torch.Tensor:
    """What a task adds to one linear, [K, N]."""
    inputs, outputs = SHAPES[path]
    if path not in bundle.modules:
        return torch.zeros(inputs, outputs)
    return delta(bundle.modules[path], bundle.row(task), torch.eye(inputs))


def assert_task_unchanged(before: Bundle, after: Bundle, task: str, name: str | None = None):
    """The same digest, and the same bits at every module."""
    name = name or task
    assert after.task_digest(name) == before.task_digest(task)
    for path in before.modules.keys() | after.modules.keys():
        assert contribution(after, name, path).equal(contribution(before, task, path))


@few
@given(clusters("a"), clusters("b"))
def test_merging_leaves_every_task_as_it_was_in_either_order(first, second):
    digests = [replace(bundle).digest for bundle in (first, second)]
    for parts in ((first, second), (second, first)):
        merged = edits.merge(parts)
        assert merged.tasks == parts[0].tasks + parts[1].tasks
        assert merged.base == "base:1"
        for part in parts:
            for task in part.tasks:
                assert_task_unchanged(part, merged, task)
    assert [replace(bundle).digest for bundle in (first, second)] == digests


@few
@given(clusters("a"), clusters("b"))
def test_dropping_what_was_merged_in_gives_the_first_back(first, second):
    bundle = edits.merge([first, second])
    for task in second.tasks:
        bundle = edits.drop_task(bundle, task)
    assert bundle.digest == first.digest


@few
@given(st.data(), clusters("a"))
def test_dropping_tasks_in_any_order_is_the_same_and_leaves_the_others(data, bundle):
    keep = data.draw(st.integers(1, len(bundle.tasks)))
    kept, dropped = bundle.tasks[:keep], bundle.tasks[keep:]
    digests = set()
    for order in (dropped, data.draw(st.permutations(dropped))):
        left = bundle
        for task in order:
            left = edits.drop_task(left, task)
        digests.add(left.digest)
        assert left.tasks == kept
        for task in kept:
            assert_task_unchanged(bundle, left, task)
        idle = [
            e.owner for e, used in zip(left.experts, left.gated.any(0), strict=True) if not used
        ]
        assert set(idle) <= set(kept)
    assert len(digests) == 1


def test_a_borrowed_expert_stays_and_the_tasks_own_notes_go():
    left = edits.drop_task(pair(), "add")
    assert left.experts == (
        Expert("common", "common", None, 2),
        Expert("add", "common", None, 1),
        Expert("sort", "own", "sort", 1),
    )
    assert left.defaults == {"sort": {"temperature": 0.0}}
    assert left.metadata == {"description": "numbers", "description.sort": "sorts"}


def test_an_expert_that_nobody_else_gates_goes():
    left = edits.drop_task(pair(), "sort")
    assert [expert.name for expert in left.experts] == ["common", "add"]
    assert left.modules["layers.0.q"].b.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]


@few
@given(clusters("a"))
def test_renaming_changes_no_digest_of_a_task_and_can_be_undone(bundle):
    renamed = edits.rename_task(bundle, "a0", "new")
    assert renamed.tasks == ("new", *bundle.tasks[1:])
    assert_task_unchanged(bundle, renamed, "a0", "new")
    assert edits.rename_task(renamed, "new", "a0").digest == bundle.digest


def test_renaming_takes_the_notes_along():
    renamed = edits.rename_task(pair(), "add", "plus")
    assert renamed.defaults["plus"] == {"temperature": 0.5}
    assert renamed.metadata["description.plus"] == "adds"
    assert {expert.name: expert.owner for expert in renamed.experts}["add"] == "plus"


@few
@given(clusters("a"), st.lists(st.floats(-2, 2).filter(bool), min_size=1, max_size=4))
def test_a_blend_as_a_task_is_the_weighted_sum_and_leaves_the_others(bundle, numbers):
    weights = dict(zip(bundle.tasks, numbers, strict=False))
    rows = edits.blended_gates(bundle, weights)
    if not any(row.any() for row in rows.values()):
        return
    wide = edits.add_task(bundle, "new", rows)
    for task in bundle.tasks:
        assert_task_unchanged(bundle, wide, task)
    for path, row in rows.items():
        expected = sum(
            weight * bundle.modules[path].gate[bundle.row(task)].double()
            for task, weight in weights.items()
        )
        assert_close(row.double(), expected, dtype=torch.float32)
        assert wide.modules[path].gate[-1].equal(row)
    assert edits.drop_task(wide, "new").tasks == bundle.tasks


@few
@given(clusters("a", dtype=torch.bfloat16), st.integers(1, 3))
def test_an_own_expert_is_appended_in_the_dtype_of_its_module(bundle, rank):
    path = next(iter(bundle.modules))
    inputs, outputs = SHAPES[path]
    factors = torch.randn(rank, inputs), torch.randn(outputs, rank)
    wide = edits.add_task(bundle, "new", {}, {path: factors})
    assert wide.experts[-1] == Expert("new", "own", "new", rank)
    x = torch.eye(inputs)
    expected = x @ factors[0].bfloat16().float().T @ factors[1].bfloat16().float().T
    assert torch.equal(delta(wide.modules[path], -1, x), expected)
    for task in bundle.tasks:
        assert_task_unchanged(bundle, wide, task)
    assert edits.drop_task(wide, "new").digest == bundle.digest


def test_names_of_experts_stay_unique():
    merged = edits.merge(
        [pair(), edits.rename_task(edits.drop_task(pair(), "sort"), "add", "plus")]
    )
    assert [expert.name for expert in merged.experts] == [
        *("common", "add", "sort"),
        *("common.2", "add.2"),
    ]
    assert edits.free_name("a" * 64, {"a" * 64, "a" * 62 + ".2"}) == "a" * 62 + ".3"


@pytest.mark.parametrize(
    ("bases", "base"),
    [
        (("base:1", "base:1"), "base:1"),
        ((None, None), None),
        (("base:1", None), None),
    ],
    ids=["same", "unknown", "one unknown"],
)
def test_a_merged_adapter_claims_only_the_base_that_all_name(bases, base):
    other = edits.rename_task(edits.drop_task(pair(), "sort"), "add", "plus")
    parts = [replace(part, base=at) for part, at in zip((pair(), other), bases, strict=True)]
    merged = edits.merge(parts)
    assert (merged.base, merged.method) == (base, "cgc")
    assert merged.metadata["description"] == "numbers"
    other = replace(other, method="lora", metadata={"description": "sums"})
    merged = edits.merge([pair(), other])
    assert (merged.method, merged.metadata["description"]) == ("merged", "numbers; sums")


def test_a_dtype_can_be_given_where_the_parts_differ():
    half = make_bundle({"layers.0.q": (4, 3)}, seed=0, tasks=["half"])
    module = half.modules["layers.0.q"]
    half = replace(
        half,
        modules={"layers.0.q": replace(module, a=module.a.bfloat16(), b=module.b.bfloat16())},
    )
    with pytest.raises(AdapterIncompatible, match=r"float32 in one .*\.bfloat16 in another"):
        edits.merge([pair(), half])
    merged = edits.merge([pair(), half], dtype=torch.float32)
    x = torch.eye(4)
    for part in (pair(), half):
        for row, task in enumerate(part.tasks):
            found = delta(merged.modules["layers.0.q"], merged.row(task), x)
            assert found.equal(delta(part.modules["layers.0.q"], row, x))


def other(**changes: object) -> Bundle:
    return replace(make_bundle({"layers.0.q": (4, 3)}, seed=0, tasks=["mul"]), **changes)


WIDE = make_bundle({"layers.0.q": (5, 3)}, seed=0, tasks=["mul"])
ONLY = make_bundle({"layers.0.q": (4, 3)}, seed=0, tasks=["add"])

REFUSED = {
    "drop an unknown task": (
        lambda: edits.drop_task(pair(), "mul"),
        AdapterNotFound,
        "'mul' in this adapter; it has 'add, sort'",
    ),
    "drop the only task": (lambda: edits.drop_task(ONLY, "add"), InvalidRequest, "delete the"),
    "rename an unknown task": (
        lambda: edits.rename_task(pair(), "mul", "x"),
        AdapterNotFound,
        "'mul'",
    ),
    "rename to a name that is taken": (
        lambda: edits.rename_task(pair(), "add", "sort"),
        AdapterExists,
        "'sort' already",
    ),
    "rename to no name": (
        lambda: edits.rename_task(pair(), "add", "No Name"),
        AdapterInvalid,
        "'No Name'",
    ),
    "merge one": (lambda: edits.merge([pair()]), InvalidRequest, "1 adapter to merge"),
    "merge tasks of one name": (
        lambda: edits.merge([pair(), ONLY]),
        AdapterExists,
        "'add' is in more than one",
    ),
    "merge different bases": (
        lambda: edits.merge([replace(pair(), base="base:1"), other(base="base:2")]),
        AdapterIncompatible,
        "'base:1' and 'base:2'",
    ),
    "merge different shapes": (
        lambda: edits.merge([pair(), WIDE]),
        AdapterIncompatible,
        "4 -> 3 in one adapter and 5 -> 3 in another",
    ),
    "add a task that is there": (
        lambda: edits.add_task(pair(), "add", {}),
        AdapterExists,
        "'add' already",
    ),
    "add a task that gates nothing": (
        lambda: edits.add_task(pair(), "mul", {}),
        AdapterInvalid,
        "'mul' gates no expert",
    ),
    "blend an unknown task": (
        lambda: edits.blended_gates(pair(), {"mul": 1.0}),
        AdapterNotFound,
        "'mul'",
    ),
    "blend nothing": (lambda: edits.blended_gates(pair(), {}), InvalidRequest, "no tasks"),
    "blend with weight 0": (
        lambda: edits.blended_gates(pair(), {"add": 0.0}),
        InvalidRequest,
        "weight 0.0 of task 'add'",
    ),
    "blend with no number": (
        lambda: edits.blended_gates(pair(), {"add": float("nan")}),
        InvalidRequest,
        "weight nan",
    ),
    "another base": (
        lambda: edits.check_base(replace(pair(), base="base:1"), "base:2"),
        AdapterIncompatible,
        "trained on base:1 and this base is base:2",
    ),
}


@pytest.mark.parametrize(("edit", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_edits_are_refused(edit, error, says):
    with pytest.raises(error) as refusal:
        edit()
    assert says in str(refusal.value)

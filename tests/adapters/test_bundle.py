"""What makes a bundle valid, which runs it has, and what its digests depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_samples import bundles
from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.errors import AdapterInvalid, AdapterNotFound

NAN, INF = float("nan"), float("inf")


def module(
    gate=((1.0, 0.0), (0.5, 2.0)),
    *,
    scale=(1.0, 1.0),
    ranks=(2, 1),
    a=None,
    b=None,
    dtype=torch.float32,
) -> ModuleDelta:
    rows = max(sum(ranks), 1)
    return ModuleDelta(
        a=torch.ones(rows, 4, dtype=dtype) if a is None else a,
        b=torch.ones(5, rows, dtype=dtype) if b is None else b,
        ranks=ranks,
        gate=torch.tensor(gate),
        scale=torch.tensor(scale),
    )


SHARED, OWN = Expert("shared", "common", None, 2), Expert("add", "own", "add", 1)


def bundle(modules=None, **changes) -> Bundle:
    fields = {
        "method": "cgc",
        "tasks": ("sort", "add"),
        "experts": (SHARED, OWN),
        "modules": {"layers.0.proj": module()} if modules is None else modules,
    }
    return Bundle(**{**fields, **changes})


def filled(value, shape, dtype=torch.float32):
    tensor = torch.ones(shape, dtype=dtype)
    tensor[-1, -1] = value
    return tensor


REFUSED = {
    "task name": ({"tasks": ("Sort", "add")}, "name_invalid", "'Sort'"),
    "task name of a path": ({"tasks": ("../x", "add")}, "name_invalid", "'../x'"),
    "task name too long": ({"tasks": ("a" * 65, "add")}, "name_invalid", "1 to 64"),
    "task named twice": ({"tasks": ("add", "add")}, "adapter_invalid", "twice"),
    "no task": ({"tasks": ()}, "adapter_limit_exceeded", "0 tasks: an adapter has 1 to 4096"),
    "method": ({"method": "CGC "}, "name_invalid", "'CGC '"),
    "base": ({"base": "x" * 257}, "adapter_invalid", "257 characters, the limit is 256"),
    "no expert": ({"experts": ()}, "adapter_limit_exceeded", "0 experts"),
    "expert named twice": (
        {"experts": (SHARED, replace(OWN, name="shared"))},
        "adapter_invalid",
        "'shared' is listed twice",
    ),
    "kind": (
        {"experts": (replace(SHARED, kind="general"), OWN)},
        "adapter_invalid",
        "'common' or 'own'",
    ),
    "common expert with an owner": (
        {"experts": (replace(SHARED, owner="sort"), OWN)},
        "expert_owner_invalid",
        "owner 'sort'",
    ),
    "own expert without an owner": (
        {"experts": (SHARED, replace(OWN, owner=None))},
        "expert_owner_invalid",
        "owner None",
    ),
    "own expert of nobody here": (
        {"experts": (SHARED, replace(OWN, owner="mul"))},
        "expert_owner_invalid",
        "owner 'mul'",
    ),
    "declared rank": (
        {"experts": (replace(SHARED, rank=3), OWN)},
        "rank_mismatch",
        "rank 3, and its largest over the modules is 2",
    ),
    "defaults of no task": ({"defaults": {"mul": {}}}, "adapter_invalid", "'mul'"),
    "default not finite": (
        {"defaults": {"add": {"temperature": INF}}},
        "value_not_finite",
        "'temperature' of task 'add' is inf",
    ),
    "notes too long": (
        {"metadata": {"text": "x" * 300_000}},
        "adapter_limit_exceeded",
        "the limit is 262144",
    ),
    "a task gates an expert only where it is absent": (
        {
            "modules": {
                "layers.0.proj": module(gate=((0.0, 1.0), (1.0, 1.0)), ranks=(2, 0)),
                "layers.1.proj": module(gate=((0.0, 0.0), (1.0, 1.0))),
            }
        },
        "task_without_expert",
        "task 'sort'",
    ),
    "no module": ({"modules": {}}, "adapter_limit_exceeded", "0 modules"),
}

REFUSED_MODULES = {
    "ranks of one expert": (module(ranks=(3,)), "rank_mismatch", "[3]; expected 2"),
    "negative rank": (module(ranks=(4, -1)), "rank_mismatch", "[4, -1]"),
    "no rank at all": (module(ranks=(0, 0)), "rank_mismatch", "not all 0"),
    "A of other rows": (module(a=torch.ones(4, 4)), "shape_mismatch", "(4, 4)"),
    "A without inputs": (module(a=torch.ones(3, 0)), "shape_mismatch", "(3, 0)"),
    "B transposed": (module(b=torch.ones(3, 5)), "shape_mismatch", "(3, 5)"),
    "B of one dimension": (module(b=torch.ones(3)), "shape_mismatch", "(3,)"),
    "B of another dtype": (
        module(b=torch.ones(5, 3, dtype=torch.float16)),
        "dtype_not_supported",
        "torch.float16",
    ),
    "double": (module(dtype=torch.float64), "dtype_not_supported", "torch.float64"),
    "gate row missing": (module(gate=((1.0, 0.0),)), "shape_mismatch", "expected (2, 2)"),
    "gate column missing": (module(gate=((1.0,), (1.0,))), "shape_mismatch", "(2, 1)"),
    "scale missing": (module(scale=(1.0,)), "shape_mismatch", "expected (2,)"),
    "NaN in A": (module(a=filled(NAN, (3, 4))), "value_not_finite", "proj.A holds nan"),
    "infinity in B": (module(b=filled(-INF, (5, 3))), "value_not_finite", "proj.B holds -inf"),
    "overflow in fp16": (module(a=filled(65536.0, (3, 4))), "value_not_finite", "65504"),
    "NaN gate": (module(gate=((NAN, 0.0), (1.0, 1.0))), "value_not_finite", "gate holds nan"),
    "infinite scale": (module(scale=(INF, 1.0)), "value_not_finite", "scale holds inf"),
    "gate times scale": (
        module(gate=((6e4, 0.0), (1.0, 1.0)), scale=(6e4, 1.0)),
        "value_not_finite",
        "gate times scale",
    ),
    "a task gates nothing": (
        module(gate=((0.0, 0.0), (0.5, 2.0))),
        "task_without_expert",
        "task 'sort'",
    ),
}


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        *REFUSED.values(),
        *(({"modules": {"layers.0.proj": bad}}, c, s) for bad, c, s in REFUSED_MODULES.values()),
    ],
    ids=[*REFUSED, *REFUSED_MODULES],
)
def test_what_no_base_could_serve_is_refused(changes, code, says):
    with pytest.raises(AdapterInvalid) as refusal:
        bundle(**changes)
    assert (refusal.value.code, refusal.value.status_code) == (code, 422)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    "path", ["", ".", "layers..proj", "../x", "layers/0", "layers.0 .proj", "a\0b", "x" * 257, "é"]
)
def test_a_module_path_is_names_joined_by_dots(path):
    with pytest.raises(AdapterInvalid) as refusal:
        bundle({path: module()})
    assert refusal.value.code == "module_path_invalid"


def test_an_expert_of_enormous_rank_is_refused():
    large = ModuleDelta(
        torch.ones(4097, 1), torch.ones(1, 4097), (4097,), torch.ones(1, 1), torch.ones(1)
    )
    with pytest.raises(AdapterInvalid) as refusal:
        Bundle("lora", ("t",), (Expert("t", "own", "t", 4097),), {"proj": large})
    assert refusal.value.code == "adapter_rank_exceeded"
    assert "4097, the limit is 4096" in str(refusal.value)


def test_a_hostile_name_is_shown_on_one_short_line():
    with pytest.raises(AdapterInvalid) as refusal:
        bundle(tasks=("\r\n\x1b[31mé" + "x" * 10_000, "add"))
    assert str(refusal.value).isprintable()
    assert str(refusal.value).isascii()
    assert len(str(refusal.value)) < 300


RUNS = {
    # gate rows of tasks a, b, c over four experts -> common, own of a, b, c
    "one common, one own each": (
        ((1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)),
        ((0,), (1,), (2,), (3,)),
    ),
    "a borrowed expert becomes common": (
        ((1, 1, 0, 0), (1, 1, 1, 0), (1, 0, 0, 1)),
        ((0, 1), (), (2,), (3,)),
    ),
    "a common expert that one task uses becomes own": (
        ((1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        ((), (0, 1), (2,), (3,)),
    ),
    "unused experts are in no run": (
        ((1, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0, 2)),
        ((0,), (), (), (3,)),
    ),
    "negative gates count": (
        ((-1, 1, 0, 0), (-2, 0, 1, 0), (-0.0, 0, 1, 1)),
        ((0, 2), (1,), (), (3,)),
    ),
}


@pytest.mark.parametrize(("gate", "expected"), RUNS.values(), ids=RUNS)
def test_experts_of_several_tasks_are_common_whatever_their_kind(gate, expected):
    experts = (
        Expert("s", "common", None, 1),
        *(Expert(t, "own", t, 1) for t in "abc"),
    )
    row = [[float(value) for value in values] for values in gate]
    one = module(gate=row, scale=(1.0,) * 4, ranks=(1,) * 4)
    runs = bundle({"proj": one}, tasks=("a", "b", "c"), experts=experts).runs()
    assert (runs.common, *runs.own.values()) == expected
    assert tuple(runs.own) == ("a", "b", "c")


def test_one_module_is_enough_to_make_an_expert_common():
    apart = module(gate=((1.0, 0.0), (0.0, 1.0)))
    runs = bundle({"layers.0.proj": apart, "layers.1.proj": module()}).runs()
    assert (runs.common, runs.own) == ((0,), {"sort": (), "add": (1,)})


def test_a_gate_on_an_absent_expert_or_with_scale_zero_counts_for_nothing():
    absent = module(gate=((1.0, 7.0), (1.0, 1.0)), ranks=(2, 0))
    silent = module(gate=((7.0, 0.0), (7.0, 1.0)), scale=(0.0, 1.0))
    both = bundle({"layers.0.proj": absent, "layers.1.proj": silent})
    assert both.gated.tolist() == [[True, False], [True, True]]
    assert absent.weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_a_task_that_is_not_there_is_named():
    with pytest.raises(AdapterNotFound, match=r"'mul'.*sort, add"):
        bundle().task_digest("mul")


@settings(max_examples=40)
@given(bundles())
def test_the_digest_does_not_depend_on_the_order_of_keys(one):
    other = replace(
        one,
        modules=dict(reversed(one.modules.items())),
        metadata=dict(reversed(one.metadata.items())),
    )
    assert other.digest == one.digest
    assert one.digest.startswith("sha256:")
    assert len(one.digest) == len("sha256:") + 64


def flipped(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """The tensor with the lowest bit of one mantissa changed."""
    copy = tensor.clone()
    bits = copy.view(torch.int32 if copy.element_size() == 4 else torch.int16).flatten()
    bits[index] ^= 1
    return copy


@settings(max_examples=60)
@given(bundles(), st.data())
def test_one_bit_changes_the_digest_and_those_of_the_tasks_that_read_it(one, data):
    path = data.draw(st.sampled_from(sorted(one.modules)))
    old = one.modules[path]
    side = data.draw(st.sampled_from(["a", "b"]))
    tensor = getattr(old, side)
    index = data.draw(st.integers(0, tensor.numel() - 1))
    rank_row = index // tensor.shape[1] if side == "a" else index % tensor.shape[1]
    expert = next(e for e, s in enumerate(old.spans) if s.start <= rank_row < s.stop)

    changed = replace(old, **{side: flipped(tensor, index)})
    other = replace(one, modules={**one.modules, path: changed})

    assert other.digest != one.digest
    for row, task in enumerate(one.tasks):
        reads_it = bool(old.weights[row, expert] != 0)
        assert (other.task_digest(task) != one.task_digest(task)) == reads_it


@settings(max_examples=40)
@given(bundles(), st.data())
def test_a_gate_changes_the_digest_of_its_task_alone(one, data):
    row = data.draw(st.integers(0, len(one.tasks) - 1))
    old = one.modules["layers.0.proj"]  # where every expert is present
    gate = old.gate.clone()
    gate[row, data.draw(st.integers(0, len(one.experts) - 1))] += 0.25
    other = replace(one, modules={**one.modules, "layers.0.proj": replace(old, gate=gate)})
    changed = [task for task in one.tasks if other.task_digest(task) != one.task_digest(task)]
    assert changed == [one.tasks[row]]
    assert other.digest != one.digest


@settings(max_examples=30)
@given(bundles())
def test_names_are_part_of_the_adapter_but_not_of_what_a_task_computes(one):
    renamed = replace(
        one,
        tasks=tuple(f"new-{task}" for task in one.tasks),
        experts=tuple(
            replace(expert, owner=expert.owner and f"new-{expert.owner}") for expert in one.experts
        ),
    )
    assert renamed.digest != one.digest
    for task in one.tasks:
        assert renamed.task_digest(f"new-{task}") == one.task_digest(task)

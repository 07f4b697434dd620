"""A bundle becomes pages and gates: which rank rows, where, and what is refused."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.image import PageImage
from oneplusn.adapters.layout import coverage, page_image
from oneplusn.errors import AdapterIncompatible, AdapterInvalid, AdapterTooLarge
from oneplusn.kernels.plan import PAGE, SiteSpec
from random_bundles import delta_weight, make_bundle, shapes_of
from tolerances import assert_close

QKV = SiteSpec("l.0.q+k+v", 3, (4, 2, 2), ("l.0.q", "l.0.k", "l.0.v"))
DOWN = SiteSpec("l.0.down", 5, (3,), ("l.0.down",))
SPECS = (QKV, DOWN)


def module(
    a: Tensor, b: Tensor, ranks: tuple[int, ...], gate: list[list[float]], scale: float = 1.0
) -> ModuleDelta:
    return ModuleDelta(a, b, ranks, torch.tensor(gate), torch.full((len(ranks),), scale))


def experts(**ranks: int) -> tuple[Expert, ...]:
    """Expert t0_x is own to t0; one without a task's name is common."""
    parts = {name: name.partition("_")[0] for name in ranks}
    return tuple(
        Expert(name, "own", parts[name], rank)
        if parts[name].startswith("t")
        else Expert(name, "common", None, rank)
        for name, rank in ranks.items()
    )


def one_module(path: str, delta: ModuleDelta, tasks: int, **ranks: int) -> Bundle:
    names = tuple(f"t{i}" for i in range(tasks))
    return Bundle("cgc", names, experts(**ranks), {path: delta})


def dense(image: PageImage, spec: SiteSpec, task: str) -> dict[str, Tensor]:
    """The weights that the pages and gates of a task stand for, fp64, by module."""
    bounds = spec.bounds
    weights = [torch.zeros(width, spec.in_features, dtype=torch.float64) for width in spec.slices]
    site = image.sites.get(spec.name)
    if site:
        starts = list(accumulate(site.run_pages, initial=0))
        for run, gates in zip(image.task_runs[task], site.gates[task], strict=True):
            pages = slice(starts[run], starts[run + 1])
            a = site.a[pages].transpose(0, 1).flatten(1, 2).double()[:, : len(gates)]
            b = site.b[pages].flatten(0, 1).double()[: len(gates)]
            for s, weight in enumerate(weights):
                columns = b[:, bounds[s] : bounds[s + 1]]
                weight += (columns.T * gates.double()) @ a[s]
    return dict(zip(spec.modules, weights, strict=True))


def test_common_experts_come_first_and_each_task_has_a_run_of_its_own() -> None:
    delta = module(
        torch.arange(18.0).view(6, 3) + 1,
        torch.arange(24.0).view(4, 6) + 1,
        ranks=(3, 2, 1),
        gate=[[2.0, 0.5, 0.0], [0.0, -0.5, 3.0]],
        scale=2.0,
    )
    image = page_image(
        one_module("l.0.q", delta, 2, t0_x=3, shared=2, t1_x=1), SPECS, torch.float32
    )

    assert image.num_runs == 3
    assert image.task_runs == {"t0": (0, 1), "t1": (0, 2)}
    assert image.sites.keys() == {QKV.name}
    site = image.sites[QKV.name]
    assert site.run_rows == (2, 3, 1)
    assert site.a.shape == (3, 3, PAGE, 3)
    assert site.b.shape == (3, PAGE, 8)
    gates = {task: [run.tolist() for run in runs] for task, runs in site.gates.items()}
    assert gates == {"t0": [[1.0, 1.0], [4.0] * 3], "t1": [[-1.0, -1.0], [6.0]]}
    torch.testing.assert_close(site.a[0, 0, :2], delta.a[3:5], rtol=0, atol=0)
    torch.testing.assert_close(site.a[1, 0, :3], delta.a[:3], rtol=0, atol=0)
    torch.testing.assert_close(site.b[2, :1, :4], delta.b[:, 5:].T, rtol=0, atol=0)
    assert not site.a[:, 1:].any()
    assert not site.b[..., 4:].any()


def test_experts_share_pages_and_a_run_ends_where_its_last_row_does() -> None:
    rank = (7, 5, 9, 2)
    gate = [[1.0] * 4, [1.0] * 4]
    delta = module(torch.ones(23, 5), torch.ones(3, 23), rank, gate)
    bundle = one_module("l.0.down", delta, 2, c0=7, c1=5, c2=9, c3=2)

    site = page_image(bundle, SPECS, torch.float32).sites[DOWN.name]

    assert site.run_rows == (23,)
    assert site.run_pages == (2,)
    rows = site.a.transpose(1, 2).reshape(32, 5)
    assert rows[:23].all()
    assert not rows[23:].any()
    assert not site.b.view(32, 3)[23:].any()


def slices_bundle(q: float, k: float, v: float) -> Bundle:
    """One expert at q, k and v, of rank 2, 3 and 1, with these scales."""
    modules = {
        path: module(torch.ones(rank, 3), torch.ones(width, rank), (rank,), [[1.0]], scale)
        for path, rank, width, scale in (
            ("l.0.q", 2, 4, q),
            ("l.0.k", 3, 2, k),
            ("l.0.v", 1, 2, v),
        )
    }
    return Bundle("lora", ("t0",), experts(t0_x=3), modules)


@pytest.mark.parametrize(
    ("scales", "gates"),
    [
        pytest.param((2.0, 2.0, 2.0), [2.0] * 3, id="all-alike"),
        pytest.param((2.0, 2.0, 1.0), [2.0] * 3 + [1.0], id="v-apart"),
        pytest.param((1.0, 2.0, 1.0), [1.0] * 2 + [2.0] * 3, id="k-apart"),
        pytest.param((1.0, 2.0, 3.0), [1.0] * 2 + [2.0] * 3 + [3.0], id="all-apart"),
        pytest.param((1.0, 0.0, 1.0), [1.0] * 2, id="ungated-slice-has-no-rows"),
    ],
)
def test_slices_share_rank_rows_if_they_are_gated_alike(scales, gates) -> None:
    bundle = slices_bundle(*scales)
    image = page_image(bundle, SPECS, torch.float32)
    site = image.sites[QKV.name]
    assert site.gates["t0"][0].tolist() == gates
    assert site.run_rows == (0, len(gates))
    for path, weight in dense(image, QKV, "t0").items():
        assert torch.equal(weight, delta_weight(bundle, "t0", path))


def test_rows_of_one_slice_are_zero_in_the_others() -> None:
    site = page_image(slices_bundle(1.0, 2.0, 3.0), SPECS, torch.float32).sites[QKV.name]
    used_a = site.a[0, :, :6].any(dim=-1).T.tolist()
    used_b = torch.stack([b.any(dim=-1) for b in site.b[0, :6].split(QKV.slices, -1)], 1).tolist()
    q, k, v = [True, False, False], [False, True, False], [False, False, True]
    assert used_a == used_b == [q, q, k, k, k, v]


def test_an_expert_that_nobody_gates_is_left_out() -> None:
    delta = module(torch.ones(4, 5), torch.ones(3, 4), (2, 2), [[1.0, 0.0]])
    image = page_image(one_module("l.0.down", delta, 1, t0_x=2, c0=2), SPECS, torch.float32)
    assert image.sites[DOWN.name].run_rows == (0, 2)
    assert image.task_runs == {"t0": (1,)}


def test_a_task_of_common_experts_alone_has_no_own_run() -> None:
    delta = module(torch.ones(5, 5), torch.ones(3, 5), (2, 3), [[1.0, 0.0], [1.0, 1.0]])
    image = page_image(one_module("l.0.down", delta, 2, c0=2, t1_x=3), SPECS, torch.float32)
    assert image.task_runs == {"t0": (0,), "t1": (0, 1)}


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    tasks = tuple(f"t{i}" for i in range(draw(st.integers(1, 4))))
    kinds = draw(st.lists(st.sampled_from((None, *tasks)), min_size=1, max_size=5))
    rank = st.integers(0, 40)
    gate = st.sampled_from((0.0, 1.0, -0.5, 3.0))
    torch.manual_seed(draw(st.integers(0, 9)))
    modules = {}
    for path, (inputs, outputs) in shapes_of(SPECS).items():
        ranks = tuple(draw(rank) for _ in kinds)
        if sum(ranks):
            gates = [[draw(gate) for _ in kinds] for _ in tasks]
            a, b = torch.randn(sum(ranks), inputs), torch.randn(outputs, sum(ranks))
            modules[path] = module(a, b, ranks, gates, scale=draw(st.sampled_from((1.0, 0.25))))
    largest = [max((m.ranks[e] for m in modules.values()), default=0) for e in range(len(kinds))]
    names = [
        Expert(f"e{i}", "own" if owner else "common", owner, r)
        for i, (owner, r) in enumerate(zip(kinds, largest, strict=True))
    ]
    try:
        return Bundle("cgc", tasks, tuple(names), modules)
    except AdapterInvalid:  # an expert without rank, or a task without expert
        reject()


@settings(max_examples=60)
@given(bundle=bundles())
def test_pages_and_gates_are_the_delta_of_every_task(bundle: Bundle) -> None:
    image = page_image(bundle, SPECS, torch.float32)
    for spec in SPECS:
        for task in bundle.tasks:
            for path, weight in dense(image, spec, task).items():
                expected = delta_weight(bundle, task, path)
                assert_close(weight, torch.zeros_like(weight) if expected is None else expected)


def test_values_round_once_to_the_pools_dtype() -> None:
    bundle = make_bundle({"l.0.down": (5, 3)}, seed=0, own={"t0": 4})
    site = page_image(bundle, SPECS, torch.bfloat16).sites[DOWN.name]
    delta = bundle.modules["l.0.down"]
    assert torch.equal(site.a[0, 0, :4], delta.a.bfloat16())
    assert torch.equal(site.b[0, :4], delta.b.T.bfloat16())
    assert site.gates["t0"][0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_largest_value_of_a_bundle_is_finite_in_every_dtype(dtype: torch.dtype) -> None:
    delta = module(torch.full((1, 5), 65504.0), torch.full((3, 1), -65504.0), (1,), [[1.0]])
    site = page_image(one_module("l.0.down", delta, 1, t0_x=1), SPECS, dtype).sites[DOWN.name]
    assert site.a.isfinite().all()
    assert site.b.isfinite().all()


def test_identities_are_those_of_the_bundle() -> None:
    bundle = make_bundle(shapes_of(SPECS), seed=1, tasks=("t0", "t1"), common=(2,))
    image = page_image(bundle, SPECS, torch.float32)
    assert image.digest == bundle.digest
    assert image.tasks == bundle.tasks
    assert image.task_keys == {task: bundle.task_digest(task) for task in bundle.tasks}


def test_an_image_takes_what_its_pages_do_and_a_limit_is_kept() -> None:
    bundle = make_bundle(shapes_of(SPECS), seed=2, tasks=("t0", "t1"), common=(9, 9))
    image = page_image(bundle, SPECS, torch.bfloat16)
    # Per site two pages of common rows and one for each task.
    assert sum(len(site.a) for site in image.sites.values()) == 8
    assert image.num_bytes == 4 * 16 * (3 * 3 + 8 + 5 + 3) * 2
    assert page_image(bundle, SPECS, torch.bfloat16, max_bytes=image.num_bytes)
    with pytest.raises(AdapterTooLarge, match="take 3200 bytes in memory, and 3199") as caught:
        page_image(bundle, SPECS, torch.bfloat16, max_bytes=image.num_bytes - 1)
    assert (caught.value.status_code, caught.value.code) == (413, "adapter_too_large")


def test_modules_that_the_base_lacks_are_named_beside_some_that_it_has() -> None:
    shapes = shapes_of(SPECS) | {f"l.{i}.up": (5, 3) for i in range(1, 8)}
    with pytest.raises(AdapterIncompatible) as caught:
        page_image(make_bundle(shapes, seed=0), SPECS, torch.float32)
    message = caught.value.message
    assert message.startswith("7 of 11 modules")
    assert "l.1.up, l.2.up, l.3.up, l.4.up, l.5.up and 2 more" in message
    assert "l.6.up" not in message
    assert "it has l.0.q, l.0.k, l.0.v, l.0.down" in message


def test_modules_that_the_base_lacks_can_be_left_out() -> None:
    shapes = shapes_of(SPECS) | {"l.1.up": (5, 3)}
    del shapes["l.0.v"]
    bundle = make_bundle(shapes, seed=0)
    reach = coverage(bundle, SPECS)
    assert reach.matched == ("l.0.q", "l.0.k", "l.0.down")
    assert (reach.unmatched, reach.missing) == (("l.1.up",), ("l.0.v",))
    image = page_image(bundle, SPECS, torch.float32, strict=False)
    assert image.sites.keys() == {QKV.name, DOWN.name}
    assert image.digest == bundle.digest


def test_an_adapter_of_which_nothing_would_be_left_is_refused() -> None:
    bundle = make_bundle({"l.1.up": (5, 3)}, seed=0)
    with pytest.raises(AdapterIncompatible) as caught:
        page_image(bundle, SPECS, torch.float32, strict=False)
    assert caught.value.code == "module_unmatched"


def test_modules_of_another_shape_are_named_with_both_shapes() -> None:
    shapes = shapes_of(SPECS) | {"l.0.k": (7, 2)}
    with pytest.raises(AdapterIncompatible, match=r"l\.0\.k \(adapter 7 -> 2, base 3 -> 2\)"):
        page_image(make_bundle(shapes, seed=0), SPECS, torch.float32)


def test_a_task_that_changes_nothing_is_refused() -> None:
    zero, one = torch.zeros(4, 5), torch.ones(3, 4)
    zero[2:] = 1
    one[:, 3:] = 0
    gate = [[1.0, 0.0], [0.0, 1.0]]
    half = module(zero, one, (2, 2), gate)
    with pytest.raises(AdapterInvalid, match=r"1 of 2 tasks change nothing.*: t0;"):
        page_image(one_module("l.0.down", half, 2, t0_x=2, t1_x=2), SPECS, torch.float32)


def test_live_rows_that_only_others_gate_do_not_count() -> None:
    b = torch.ones(3, 4)
    b[:, :2] = 0
    delta = module(torch.ones(4, 5), b, (2, 2), [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(AdapterInvalid, match=r"1 of 3 tasks change nothing.*: t0;"):
        page_image(one_module("l.0.down", delta, 3, c0=2, c1=2), SPECS, torch.float32)


def test_a_in_one_slice_and_b_in_another_change_nothing() -> None:
    q = module(torch.ones(2, 3), torch.zeros(4, 2), (2,), [[1.0]])
    k = module(torch.zeros(2, 3), torch.ones(2, 2), (2,), [[1.0]])
    bundle = Bundle("lora", ("t0",), experts(t0_x=2), {"l.0.q": q, "l.0.k": k})
    with pytest.raises(AdapterInvalid, match="change nothing"):
        page_image(bundle, SPECS, torch.float32)


def test_a_delta_that_the_dtype_rounds_to_zero_is_refused() -> None:
    small = module(torch.full((1, 5), 1e-9), torch.ones(3, 1), (1,), [[1.0]])
    bundle = one_module("l.0.down", small, 1, t0_x=1)
    assert page_image(bundle, SPECS, torch.bfloat16).num_bytes
    with pytest.raises(AdapterInvalid, match="change nothing"):
        page_image(bundle, SPECS, torch.float16)

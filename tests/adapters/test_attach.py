"""Which linears adapters reach, and that a wrapped model computes base plus delta."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oneplusn.adapters.attach import Attached, attach, find_sites
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.layout import page_image
from oneplusn.adapters.pool import Pool
from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import OneplusnError
from oneplusn.kernels.plan import SiteSpec, StepContext, StepHandle, build_plan
from random_bundles import delta_weight, make_bundle, shapes_of
from tiny_models import VOCAB, tiny_model
from tolerances import assert_close

LENGTH = 6

# Per family, the sites of layer 0 as (in, outs) below `model.layers.0.`.
QKV = ("self_attn.q_proj+k_proj+v_proj", 32, (32, 16, 16))
ATTENTION_OUT = ("self_attn.o_proj", 32, (32,))
GATE_UP = ("mlp.gate_proj+up_proj", 32, (64, 64))
DOWN = ("mlp.down_proj", 64, (32,))
DENSE = (QKV, ATTENTION_OUT, GATE_UP, DOWN)
LAYER_0 = {
    "llama": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "mistral": DENSE,
    "gemma2": DENSE,
    "gemma3": DENSE,
    "phi3": (
        ATTENTION_OUT,
        ("self_attn.qkv_proj", 32, (64,)),
        ("mlp.gate_up_proj", 32, (128,)),
        DOWN,
    ),
    "mixtral": (QKV, ATTENTION_OUT),
    "gpt2": (
        ("attn.c_attn", 32, (96,)),
        ("attn.c_proj", 32, (32,)),
        ("mlp.c_fc", 32, (128,)),
        ("mlp.c_proj", 128, (32,)),
    ),
    "gpt_oss": (QKV, ATTENTION_OUT),
}
FAMILIES = tuple(LAYER_0)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_a_family(family: str) -> None:
    prefix = "transformer.h" if family == "gpt2" else "model.layers"
    found = [(s.name, s.in_features, s.slices) for s in find_sites(tiny_model(family))]
    assert found == [
        (f"{prefix}.{layer}.{name}", inputs, outputs)
        for layer in range(2)
        for name, inputs, outputs in LAYER_0[family]
    ]


def test_a_site_knows_the_modules_of_its_slices() -> None:
    site = find_sites(tiny_model("llama"))[4]
    parent = "model.layers.1.self_attn"
    assert site.name == f"{parent}.q_proj+k_proj+v_proj"
    assert site.modules == (f"{parent}.q_proj", f"{parent}.k_proj", f"{parent}.v_proj")


class Layer(nn.Module):
    """A layer of plain linears, each called on the tensor that `read` picks for it."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, (inputs, outputs) in shapes.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))


def toy(shapes: Mapping[str, tuple[int, int]], **outside: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(shapes)])
    for name, module in outside.items():
        model.add_module(name, module)
    return model


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        pytest.param(
            {"value": (8, 4), "query": (8, 8), "key": (8, 4)},
            ["layers.0.query+key+value"],
            id="order-of-the-table",
        ),
        pytest.param({"w1": (8, 4), "w2": (4, 8), "w3": (8, 4)}, ["layers.0.w1+w3", "layers.0.w2"]),
        pytest.param(
            {"q_proj": (8, 8), "k_proj": (8, 4)}, ["layers.0.q_proj+k_proj"], id="no-v-of-its-own"
        ),
        pytest.param(
            {"q_proj": (8, 8), "k_proj": (6, 4), "v_proj": (6, 4)},
            ["layers.0.q_proj", "layers.0.k_proj+v_proj"],
            id="another-width-is-another-site",
        ),
        pytest.param({"gate": (8, 4), "fc": (8, 8)}, ["layers.0.fc"], id="router-is-left-out"),
    ],
)
def test_siblings_of_equal_width_make_a_site(shapes, names) -> None:
    assert [site.name for site in find_sites(toy(shapes))] == names


def test_experts_shared_modules_and_the_head_are_no_sites() -> None:
    model = toy({"fc": (8, 8)}, lm_head=nn.Linear(8, 32), embed=nn.Embedding(32, 8))
    layer = model.layers[0]
    layer.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
    layer.twice, layer.again = 2 * (nn.Linear(8, 8),)
    assert [site.name for site in find_sites(model)] == ["layers.0.fc"]


class Packed(nn.Module):
    """A linear in a form of its own: shapes are known, and there is no weight to look at."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = linear.weight.detach().T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._packed


class Serving:
    """A model with a pool attached, and the bundles that are loaded."""

    def __init__(self, model: nn.Module, bundles: Sequence[Bundle] = ()) -> None:
        self.model = model
        specs = find_sites(model)
        self.pool = Pool(specs, memory_bytes=8 << 20, dtype=torch.float32, max_tasks=16)
        for bundle in bundles:
            self.pool.load(page_image(bundle, specs, torch.float32))
        self.handle = StepHandle()
        self.attached: Attached = attach(model, self.pool.sites, self.handle)

    @contextmanager
    def step(self, requests: Sequence[Sequence[TaskRef]], length: int = LENGTH) -> Iterator[None]:
        """A step in which each request has `length` rows."""
        slots = [slot for refs in requests for slot in [self.pool.acquire(refs)] * length]
        self.handle.current = StepContext(build_plan(slots, self.pool.slots), None)
        yield
        self.handle.current = None
        self.attached.check_step_end()

    @torch.inference_mode()
    def logits(self, tokens: Tensor, requests: Sequence[Sequence[TaskRef]]) -> Tensor:
        with self.step(requests):
            return run(self.model, tokens)


@torch.inference_mode()
def run(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def random_tokens(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)


def ref(bundle: Bundle, task: str, weight: float = 1.0) -> TaskRef:
    return TaskRef(bundle.digest, task, weight)


def clusters(specs: Sequence[SiteSpec]) -> tuple[Bundle, Bundle, Bundle]:
    """A gated cluster at every module, one at some siblings only, and a plain LoRA."""
    shapes = shapes_of(specs)
    partial = {path: shape for i, (path, shape) in enumerate(shapes.items()) if i % 3 != 1}
    return (
        make_bundle(shapes, seed=1, tasks=("a0", "a1", "a2"), common=(2, 5), own={"a0": 20}),
        make_bundle(partial, seed=2, tasks=("b0", "b1"), common=(4,), gates_differ=True),
        make_bundle(shapes, seed=3, tasks=("c0",), own={"c0": 8}),
    )


def merged(
    model: PreTrainedModel, bundles: Sequence[Bundle], refs: Sequence[TaskRef]
) -> PreTrainedModel:
    """A copy of the bare model with the deltas of `refs` in its weights."""
    by_digest = {bundle.digest: bundle for bundle in bundles}
    copied = copy.deepcopy(model)
    for task in refs:
        bundle = by_digest[task.digest]
        for path in bundle.modules:
            weight = copied.get_submodule(path).weight.data
            delta = task.weight * delta_weight(bundle, task.task, path)
            transposed = hasattr(copied.get_submodule(path), "nx")
            weight += (delta.T if transposed else delta).float()
    return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_equals_models_with_merged_weights(family: str) -> None:
    model = tiny_model(family)
    bare = copy.deepcopy(model)
    bundles = clusters(find_sites(model))
    a, b, c = bundles
    requests = [
        [ref(a, "a0")],
        [],
        [ref(b, "b1")],
        [ref(a, "a1")],
        [ref(c, "c0")],
        [ref(a, "a2", 0.5), ref(b, "b0", -0.75), ref(c, "c0", 0.25), ref(a, "a0")],
        [ref(b, "b0", 2.0)],
        [ref(a, "a0")],
    ]
    tokens = random_tokens(len(requests))

    logits = Serving(model, bundles).logits(tokens, requests)

    for row, refs in enumerate(requests):
        expected = run(merged(bare, bundles, refs), tokens[row : row + 1])[0]
        assert_close(logits[row], expected)
        if refs:
            assert not torch.allclose(logits[row], run(bare, tokens[row : row + 1])[0], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_adapted_rows_every_bit_is_the_bare_models(family: str) -> None:
    model = tiny_model(family)
    tokens = random_tokens(3)
    expected = run(model, tokens)
    serving = Serving(model, clusters(find_sites(model)))
    assert torch.equal(run(model, tokens), expected)
    assert torch.equal(serving.logits(tokens, [[], [], []]), expected)


def test_a_step_without_adapted_rows_calls_base_linears_only(monkeypatch) -> None:
    model = tiny_model("llama")
    serving = Serving(model)
    monkeypatch.setattr("oneplusn.adapters.attach.gated_delta", None)
    serving.logits(random_tokens(1), [[]])


def test_two_attached_models_do_not_disturb_each_other() -> None:
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    bundles = clusters(find_sites(models[0]))
    tokens = random_tokens(2)
    refs = [[[ref(bundles[0], "a0")], []], [[], [ref(bundles[2], "c0")]]]
    alone = [
        Serving(copy.deepcopy(model), bundles).logits(tokens, r)
        for model, r in zip(models, refs, strict=True)
    ]
    first, second = (Serving(model, bundles) for model in models)

    with first.step(refs[0]), second.step(refs[1]):
        assert torch.equal(run(second.model, tokens), alone[1])
        assert torch.equal(run(first.model, tokens), alone[0])
        assert torch.equal(run(second.model, tokens), alone[1])


def test_tied_weights_stay_tied_and_detach_restores_the_modules() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    tokens = random_tokens(2)
    before, expected = dict(model.named_modules()), run(model, tokens)
    bundles = clusters(find_sites(model))
    serving = Serving(model, bundles)

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(serving.logits(tokens, [[ref(bundles[0], "a0")], []]), expected)
    serving.attached.detach()

    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[path] is module for path, module in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with serving.step([[ref(bundles[0], "a0")], []]):
        assert torch.equal(run(model, tokens), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_linear_can_have_another_form(when: str) -> None:
    model = tiny_model("llama")
    bundles = clusters(find_sites(model))
    requests = [[ref(bundles[0], "a1")], []]
    tokens = random_tokens(2)
    expected = Serving(copy.deepcopy(model), bundles).logits(tokens, requests)
    paths = list(shapes_of(find_sites(model)))

    if when == "before":
        for path in paths:
            model.set_submodule(path, Packed(model.get_submodule(path)))
    serving = Serving(model, bundles)
    if when == "after":
        for path in paths:
            wrapped = model.get_submodule(path)
            wrapped.base = Packed(wrapped.base)

    assert_close(serving.logits(tokens, requests), expected)


def toy_step(shapes: Mapping[str, tuple[int, int]]) -> tuple[Serving, Sequence[TaskRef], nn.Module]:
    model = toy(shapes)
    bundle = make_bundle(shapes_of(find_sites(model)), seed=0)
    return Serving(model, [bundle]), [ref(bundle, "t0")], model.layers[0]


QK = {"q_proj": (8, 4), "k_proj": (8, 6)}


def test_siblings_are_computed_once_whoever_is_called_first() -> None:
    serving, task, layer = toy_step(QK)
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        with serving.step([task, []], length=3):
            one = layer.q_proj(x), layer.k_proj(x)
        with serving.step([task, []], length=3):
            other = layer.k_proj(x), layer.q_proj(x)
    assert one[0].shape == (2, 3, 4)
    assert torch.equal(one[0], other[1])
    assert torch.equal(one[1], other[0])
    assert torch.equal(one[0][1], layer.q_proj(x)[1])


@torch.inference_mode()
def test_another_x_for_a_sibling_is_an_error_and_leaves_nothing_behind() -> None:
    serving, task, layer = toy_step(QK)
    x = torch.randn(3, 8)
    with serving.step([task], length=3):
        layer.q_proj(x)
        with pytest.raises(OneplusnError, match=r"k_proj was called .* another input"):
            layer.k_proj(x.clone())
        layer.k_proj(x)
        layer.q_proj(x)


@torch.inference_mode()
def test_a_sibling_called_twice_is_an_error() -> None:
    serving, task, layer = toy_step(QK)
    x = torch.randn(3, 8)
    with serving.step([task], length=3):
        layer.q_proj(x)
        with pytest.raises(OneplusnError, match=r"q_proj was called again .* layers\.0\.k_proj"):
            layer.q_proj(x)


@torch.inference_mode()
def test_a_sibling_not_called_is_an_error_at_the_end_of_the_step() -> None:
    serving, task, layer = toy_step(QK)
    with (
        pytest.raises(OneplusnError, match=r"not called in this step.*layers\.0\.q_proj"),
        serving.step([task], length=3),
    ):
        layer.k_proj(torch.randn(3, 8))
    serving.attached.check_step_end()


@torch.inference_mode()
def test_rows_that_are_not_the_batchs_are_an_error() -> None:
    serving, task, layer = toy_step({"fc": (8, 4)})
    with (
        serving.step([task], length=3),
        pytest.raises(OneplusnError, match=r"layers\.0\.fc got 2 rows in a step of 3"),
    ):
        layer.fc(torch.randn(2, 8))

"""Fast layers compute what the layers of transformers do, with adapters and without."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from oneplusn.errors import ModelRefused
from oneplusn.kernels import ops
from oneplusn.server.engine import families
from oneplusn.server.engine.families import FastLayer, accelerate
from oneplusn.server.engine.linear import CompiledLinear
from oneplusn.server.engine.model import prepare_model
from oneplusn.server.engine.probe import probe
from tiny_models import tiny_model

FAST = ("llama", "qwen2", "qwen3", "mistral")
SHAPES = [{}, {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}]


@pytest.mark.parametrize("changes", SHAPES, ids=["heads of 8", "heads of 32"])
@pytest.mark.parametrize("family", FAST)
def test_a_fast_model_has_the_logits_of_its_original(family: str, changes: dict) -> None:
    if family == "qwen3" and changes:
        changes = changes | {"head_dim": 32}
    model = tiny_model(family, **changes)
    report = probe(model, accelerate)  # compares with the original's logits
    assert all(isinstance(layer, FastLayer) for layer in model.model.layers)
    assert report.error < report.bound


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "mixtral"])
def test_other_families_stay_as_they_are(family: str) -> None:
    model = tiny_model(family)
    before = [type(module) for module in model.modules()]
    assert not accelerate(model)
    assert [type(module) for module in model.modules()] == before


def test_another_activation_is_left_alone() -> None:
    assert not accelerate(tiny_model("llama", hidden_act="gelu"))


def test_a_linear_that_is_exchanged_is_looked_up_again() -> None:
    model = tiny_model("llama")
    probe(model, accelerate)
    stack = families.stack_of(model)
    assert stack is not None
    hook = SimpleNamespace(cache=stack._cache)
    bound = stack._bind(hook)
    assert stack._bind(hook) is bound
    mlp = model.model.layers[1].mlp
    mlp.add_module("down_proj", CompiledLinear(mlp.down_proj.panels))
    assert stack._bind(hook) is not bound


def test_biases_go_along() -> None:
    model = tiny_model("llama", attention_bias=True)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.self_attn.get_submodule(name).bias.data.normal_()
    assert probe(model, accelerate).error < 1e-4
    assert isinstance(model.model.layers[0], FastLayer)


def test_without_the_compiled_kernels_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled", lambda: False)
    assert not accelerate(tiny_model("llama"))


def test_half_precision_takes_the_generic_path() -> None:
    assert not accelerate(tiny_model("llama").half())


def test_a_fast_layer_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = families.Stack.run

    def wrong(stack: families.Stack, h: torch.Tensor, *rest: torch.Tensor) -> None:
        right(stack, h, *rest)
        h[-1, 0] += 0.1

    monkeypatch.setattr(families.Stack, "run", wrong)
    with pytest.raises(ModelRefused, match="off by"):
        probe(tiny_model("llama"), accelerate)


def test_sites_are_those_of_the_original(tmp_path) -> None:
    generic, fast = tiny_model("llama"), tiny_model("llama")
    loaded = prepare_model(fast, tmp_path)
    assert isinstance(fast.model.layers[0], FastLayer)
    names = [name for name, _ in generic.named_modules()]
    for site in loaded.sites:
        assert set(site.modules) <= set(names)
        assert fast.get_submodule(site.name).out_features == sum(site.slices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [256, 250])
def test_a_tied_embedding_is_read_from_the_head(tmp_path, dtype, vocab_size) -> None:
    model = tiny_model("llama", tie_word_embeddings=True, vocab_size=vocab_size).to(dtype)
    ids = torch.tensor([[0, 1, 31, 32], [33, 255 % vocab_size, vocab_size - 1, 0]])
    expected, weights = model.get_input_embeddings()(ids), model.num_parameters()
    loaded = prepare_model(model, tmp_path)
    assert torch.equal(model.get_input_embeddings()(ids), expected)
    assert loaded.num_bytes < 1.05 * weights * dtype.itemsize


def test_an_embedding_of_its_own_stays(tmp_path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    embedding = model.get_input_embeddings()
    prepare_model(model, tmp_path)
    assert model.get_input_embeddings() is embedding

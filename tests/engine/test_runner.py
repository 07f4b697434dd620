"""The runner: one forward pass a step, and linears whose packed form changes nothing."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from oneplusn.errors import ModelRefused
from oneplusn.kernels import ops
from oneplusn.server.engine.engine import Engine, EngineConfig
from oneplusn.server.engine.families import accelerate, model_logits
from oneplusn.server.engine.linear import (
    CompiledLinear,
    PackedLinear,
    can_pack,
    pack_linears,
)
from oneplusn.server.engine.model import prepare_model
from tiny_engines import MIB, cluster, mixed_jobs, run, tiny_engine
from tiny_models import tiny_model
from tolerances import assert_close

bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bf16 product"
)


@bf16
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 1536), (1536, 576), (24, 7)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_linear_equals_the_plain_one_bit_for_bit(rows, inputs, outputs, with_bias) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=draw).bfloat16()
    bias = torch.randn(outputs, generator=draw).bfloat16() if with_bias else None
    x = torch.randn(1, rows, inputs, generator=draw).bfloat16()
    with torch.inference_mode():
        assert torch.equal(PackedLinear(weight, bias)(x), linear(x, weight, bias))


@bf16
@pytest.mark.parametrize("kind", [CompiledLinear, PackedLinear])
def test_a_packed_linear_takes_no_rows(kind: type[nn.Module], monkeypatch) -> None:
    monkeypatch.setattr(ops, "compiled", lambda: kind is CompiledLinear)
    model = nn.Sequential(nn.Linear(24, 7, dtype=torch.bfloat16))
    pack_linears(model)
    assert isinstance(model[0], kind)
    assert model(torch.empty(1, 0, 24, dtype=torch.bfloat16)).shape == (1, 0, 7)


@bf16
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_model_computes_the_same(family: str) -> None:
    model = tiny_model(family).bfloat16()
    packed = copy.deepcopy(model)
    plain = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert pack_linears(packed) == len(plain)
    assert not any(isinstance(m, nn.Linear | Conv1D) for m in packed.modules())
    assert sum(isinstance(m, CompiledLinear) for m in packed.modules()) == len(plain)
    tokens = torch.arange(9)[None]
    with torch.inference_mode():
        assert_close(packed(tokens).logits, model(tokens).logits)


@bf16
def test_without_compiled_kernels_the_packed_model_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "compiled", lambda: False)
    model = tiny_model("llama").bfloat16()
    packed = copy.deepcopy(model)
    assert pack_linears(packed) == sum(isinstance(m, PackedLinear) for m in packed.modules()) > 0
    tokens = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(packed(tokens).logits, model(tokens).logits)


@bf16
def test_tied_embedding_keeps_its_weight() -> None:
    model = tiny_model("llama", tie_word_embeddings=True).bfloat16()
    expected = model.model.embed_tokens.weight.clone()
    pack_linears(model)
    assert torch.equal(model.model.embed_tokens.weight, expected)


def test_without_compiled_kernels_fp32_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled", lambda: False)
    assert not can_pack(torch.zeros(2, 2))
    assert pack_linears(tiny_model("llama")) == 0


def test_half_precision_is_left_alone() -> None:
    assert pack_linears(tiny_model("llama").half()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_engine_serves_a_mixed_batch_from_packed_linears(dtype: torch.dtype) -> None:
    engine = tiny_engine("llama", dtype=dtype)
    bundle = cluster(tiny_model("llama"), ["a", "b"], common=(2,), seed=1)
    engine.load(bundle)
    assert sum(isinstance(m, CompiledLinear) for m in engine.model.model.modules()) == 9
    answers, _ = run(engine, mixed_jobs([bundle]))
    assert [len(answer.tokens) for answer in answers] == [8, 8, 8]
    assert len({tuple(answer.tokens) for answer in answers}) == 3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_closed_runner_leaves_the_model_as_it_was(family: str) -> None:
    engine = tiny_engine(family)
    model = tiny_model(family)
    is_fast = accelerate(model)
    names = [name for name, _ in model.named_modules()]
    assert [name for name, _ in engine.model.model.named_modules()] != names
    engine.close()
    assert [name for name, _ in engine.model.model.named_modules()] == names
    if not is_fast:
        tokens = torch.arange(5)[None]
        with torch.inference_mode():
            assert_close(engine.model.model(tokens).logits, model(tokens).logits)


def test_dropped_engine_frees_its_cache() -> None:
    engine = tiny_engine("llama")
    cache = ref(engine.runner.hook._cache)
    del engine
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_model_outside_of_a_step_fails_loudly(family: str) -> None:
    engine = tiny_engine(family)
    with pytest.raises(AssertionError, match="outside of a step"):
        model_logits(engine.model.model, torch.arange(3), torch.arange(3), torch.arange(3))


def test_model_that_reads_the_weights_of_its_linears_is_refused() -> None:
    model = tiny_model("llama")

    class Around(LlamaMLP):
        def forward(self, x):
            return linear(super().forward(x), self.up_proj.weight.T[: x.shape[-1], : x.shape[-1]])

    model.model.layers[0].mlp.__class__ = Around
    loaded = prepare_model(model, Path())
    with pytest.raises(ModelRefused, match="reads its linears' weights itself"):
        Engine(loaded, EngineConfig(kv_memory=MIB, adapter_memory=16 * MIB))

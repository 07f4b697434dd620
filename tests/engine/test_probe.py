"""Every model is proven against its own attention before it is served, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oneplusn.errors import ModelRefused
from oneplusn.server.engine import attention
from oneplusn.server.engine.attention import LayerShape
from oneplusn.server.engine.probe import discover_layers, probe
from tiny_models import tiny_model

SERVED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "gpt2",
    "gpt_oss",
)


@pytest.mark.parametrize("family", SERVED)
def test_family_passes(family: str) -> None:
    report = probe(tiny_model(family))
    assert report.error < report.bound
    assert report.dtype == torch.float32
    assert len(report.layers) == 2


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_family_without_the_interface_is_refused_with_the_count(family: str) -> None:
    with pytest.raises(ModelRefused, match="0 calls of the attention hook by 2 layers"):
        probe(tiny_model(family))


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", (LayerShape(2, 8, 8),) * 2),
        ("gpt2", (LayerShape(4, 8, 8),) * 2),
        ("gemma2", (LayerShape(2, 8, 8, window=20), LayerShape(2, 8, 8))),
        ("mistral", (LayerShape(2, 8, 8, window=20),) * 2),
    ],
)
def test_cache_shapes_come_from_a_dry_run(family: str, layers: tuple[LayerShape, ...]) -> None:
    assert discover_layers(tiny_model(family)) == layers


def test_bf16_model_is_probed_as_an_fp32_copy() -> None:
    model = tiny_model("llama").bfloat16()
    report = probe(model)
    assert report.dtype == torch.float32
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("lost", ["sliding_window", "softcap", "s_aux"])
def test_attention_that_loses_an_argument_is_refused_with_the_error(lost, monkeypatch) -> None:
    family = {"sliding_window": "mistral", "softcap": "gemma2", "s_aux": "gpt_oss"}[lost]
    model = tiny_model(family, **({"attn_logit_softcapping": 1.0} if lost == "softcap" else {}))
    complete = attention._options
    monkeypatch.setattr(
        attention,
        "_options",
        lambda kwargs: complete({k: v for k, v in kwargs.items() if k != lost}),
    )
    with pytest.raises(ModelRefused, match=r"off by [\d.e-]+ of their standard deviation"):
        probe(model)


def test_layer_that_calls_twice_is_refused() -> None:
    model = tiny_model("llama")
    first = model.model.layers[0].self_attn

    class Twice(nn.Module):
        def forward(self, *args, **kwargs):
            first(*args, **kwargs)
            return first(*args, **kwargs)

    model.model.layers[0].self_attn = Twice()
    with pytest.raises(ModelRefused, match=r"3 calls .* by 2 layers.*layer 0: 2, layer 1: 1"):
        probe(model)


def test_model_keeps_its_weights_and_its_own_attention() -> None:
    model = tiny_model("qwen3")
    tokens = torch.arange(7)[None]
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        before = model(tokens).logits
        probe(model)
        assert torch.equal(model(tokens).logits, before)

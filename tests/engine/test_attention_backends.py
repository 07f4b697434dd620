"""Who computes attention, and that it computes what every family's own attention does."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from oneplusn.kernels import attention_reference, triton_attention_backend
from oneplusn.kernels.plan import StepHandle
from oneplusn.server.engine.attention import AttentionHook, KVCache, LayerShape, _options
from oneplusn.server.engine.attention_backends import BACKENDS, choose
from paged_steps import Context, lay_out
from tiny_models import tiny_model
from tolerances import assert_close

FAMILIES = (
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
TOKENS, CHUNK = 27, 8
"""More tokens than the windows of the tiny models have."""


@dataclass(frozen=True)
class Call:
    """What a layer handed to its family's own attention, and what that answered `[T, H, Dv]`."""

    context: Context
    scale: float
    options: dict[str, object]
    answer: Tensor


def calls_of(model: PreTrainedModel) -> list[Call]:
    """Run a model on one sequence by its family's eager function; return the layers' calls."""
    eager: Callable[..., Any] = sys.modules[type(model).__module__].eager_attention_forward
    calls = []

    def record(module, query, key, value, attention_mask, scaling=None, **kwargs):
        rows, columns = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
        window, softcap, sinks = _options(kwargs)
        hidden = (columns > rows) | (columns <= rows - (window or TOKENS))
        mask = torch.zeros(TOKENS, TOKENS).masked_fill(hidden, -math.inf)[None, None]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        answer, weights = eager(module, query, key, value, mask, scaling=scale, **kwargs)
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        options = {"window": window, "softcap": softcap, "sinks": sinks}
        calls.append(Call(Context(q, k, v), scale, options, answer[0]))
        return answer, weights

    AttentionInterface.register("recorded", record)
    model.set_attn_implementation("recorded")
    tokens = torch.randint(96, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_compute_what_the_family_itself_does(family: str) -> None:
    """The last row as a decode row, the last eight as a chunk behind a prefix."""
    calls = calls_of(tiny_model(family))
    assert len(calls) == 2
    for call in calls:
        step = lay_out([call.context.last(1, TOKENS), call.context.last(CHUNK, TOKENS)])
        wanted = torch.cat((call.answer[-1:], call.answer[-CHUNK:]))
        for backend in (attention_reference, triton_attention_backend):
            actual = backend.paged_attention(
                step.q, step.k_cache, step.v_cache, step.meta, scale=call.scale, **call.options
            )
            assert_close(actual, wanted)


def test_the_families_pass_windows_softcaps_and_sinks() -> None:
    passed = {
        family: [name for name, value in call.options.items() if value is not None]
        for family in ("mistral", "gemma2", "gpt_oss")
        for call in calls_of(tiny_model(family))[:1]
    }
    assert passed == {
        "mistral": ["window"],
        "gemma2": ["window", "softcap"],
        "gpt_oss": ["window", "sinks"],
    }


def cache(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, dim: int = 128) -> list[Tensor]:
    return [torch.empty(16, 2, dim, dtype=dtype, device=device)]


@pytest.mark.parametrize(
    ("forced", "caches", "name", "reasons"),
    [
        (None, cache(), "cpu", {"triton": "on the CPU it takes ONEPLUSN_KERNELS=triton and"}),
        ("torch", cache(), "cpu", {"triton": "on the CPU it takes"}),
        ("triton", cache(), "triton", {"triton": "", "cpu": "", "reference": ""}),
        ("triton", cache(dim=256), "triton", {}),
        ("triton", cache(dim=512), "cpu", {"triton": "heads have 512 columns, the limit is 256"}),
        ("triton", cache(dtype=torch.float64), "cpu", {"triton": "it does not know torch.float64"}),
        (
            None,
            cache("meta"),
            "reference",
            {"triton": "it does not know the device 'meta'", "cpu": "the cache is on 'meta'"},
        ),
    ],
)
def test_the_first_backend_that_can_is_chosen_and_the_others_say_why_not(
    forced, caches, name, reasons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("ONEPLUSN_KERNELS", raising=False)
    if forced:
        monkeypatch.setenv("ONEPLUSN_KERNELS", forced)
    assert choose(caches).name == name
    for backend in BACKENDS:
        if backend.name in reasons:
            said = backend.why_not(caches)
            assert said.startswith(reasons[backend.name])
            assert bool(said) == bool(reasons[backend.name])


def test_every_backend_offers_both_functions() -> None:
    for backend in BACKENDS:
        assert all(map(callable, backend.load()))


def test_a_slow_choice_is_told_with_its_reasons(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choose(cache("meta"))
    assert "row by row" in caplog.text
    assert "cpu: the cache is on 'meta'" in caplog.text


def test_a_hook_has_the_backend_that_its_cache_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LayerShape(2, 8, 8)
    for forced, name in (("triton", "triton"), ("torch", "cpu")):
        monkeypatch.setenv("ONEPLUSN_KERNELS", forced)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        hook = AttentionHook(StepHandle(), KVCache([shape], 2, 16, torch.float32))
        assert hook.backend.name == name

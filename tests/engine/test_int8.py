"""A base in int8 serves what its rounded weights compute, in any company, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from oneplusn.errors import ConfigError, ModelRefused
from oneplusn.kernels import ops
from oneplusn.kernels.cpu_linear import Int8Weight
from oneplusn.server.engine import linear as linear_module
from oneplusn.server.engine import probe as probe_module
from oneplusn.server.engine.families import FastLayer
from oneplusn.server.engine.linear import CompiledLinear, rounded_linears
from oneplusn.server.engine.llm import Engine as Llm
from oneplusn.server.engine.model import LoadedModel, load_model, prepare_model
from oneplusn.server.launch import build_engine
from oneplusn.server.settings import load_settings
from tiny_engines import MIB, Job, clusters, merged, mixed_jobs, record_logits, run, tiny_engine
from tiny_models import tiny_model
from tolerances import assert_close

INT8 = torch.int8
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama on disk, in bf16."""
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    return tmp_path


def stored(model: nn.Module) -> set[torch.dtype]:
    return {m.panels.stored for m in model.modules() if isinstance(m, CompiledLinear)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fast_model_passes_its_probe(family: str, dtype: torch.dtype) -> None:
    loaded = prepare_model(tiny_model(family).to(dtype), Path(), stored=INT8)
    assert all(isinstance(layer, FastLayer) for layer in loaded.model.model.layers)
    assert stored(loaded.model) == {INT8}
    assert loaded.probe.dtype == torch.float32
    assert loaded.probe.error <= loaded.probe.bound == 1e-4


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "mixtral"])
def test_any_other_family_keeps_its_plain_linears_in_int8(family: str) -> None:
    model = tiny_model(family)
    expected = copy.deepcopy(model)
    loaded = prepare_model(model, Path(), stored=INT8)
    assert stored(loaded.model) == {INT8}
    tokens = torch.arange(9)[None]
    with torch.inference_mode(), rounded_linears(expected, INT8):
        assert_close(loaded.model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_too_large_for_a_copy_is_probed_itself(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "FP32_WEIGHTS", 0)
    loaded = prepare_model(tiny_model(family).bfloat16(), Path(), stored=INT8)
    assert stored(loaded.model) == {INT8}
    assert loaded.probe.dtype == torch.bfloat16
    assert loaded.probe.error <= loaded.probe.bound == 0.1


def test_a_probe_that_expects_other_values_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Int8Weight):
        def values(self, dtype: torch.dtype) -> torch.Tensor:
            return super().values(dtype) * 1.001

    monkeypatch.setattr(linear_module, "Int8Weight", Other)
    with pytest.raises(ModelRefused, match="off by"):
        prepare_model(tiny_model("llama"), Path(), stored=INT8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_rounding_ends_with_its_context(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = dict(model.named_parameters())
    values = {name: weight.clone() for name, weight in before.items()}
    expected = Int8Weight.of(head.weight).values(torch.float32)
    with rounded_linears(model, INT8):
        assert torch.equal(head.weight, expected)
        assert embedding.weight is next(iter(before.values()))
    assert (head.weight is embedding.weight) is tied
    assert all(weight is before[name] for name, weight in model.named_parameters())
    assert all(torch.equal(weight, values[name]) for name, weight in before.items())


def test_a_tied_embedding_keeps_its_values_and_the_head_is_rounded() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    expected = model.get_input_embeddings().weight.clone()
    loaded = prepare_model(model, Path(), stored=INT8)
    assert torch.equal(loaded.model.get_input_embeddings().weight, expected)
    assert loaded.model.lm_head.panels.stored == INT8


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@DTYPES
def test_a_mixed_batch_gets_the_bits_of_solo_runs(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = clusters(tiny_model(family))
    jobs = mixed_jobs(bundles)

    def logits_of(some: list[Job]) -> dict[str, list[torch.Tensor]]:
        engine = tiny_engine(family, bundles, dtype=dtype, stored=INT8)
        recorded = record_logits(engine, monkeypatch)
        run(engine, some)
        return recorded

    mixed = logits_of(jobs)
    for index in (0, 3, 8):
        (solo,) = logits_of([jobs[index]]).values()
        assert torch.equal(torch.stack(mixed[str(index)]), torch.stack(solo))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tasks_are_served_as_by_the_rounded_model_with_their_deltas(family: str) -> None:
    bundles = clusters(tiny_model(family))
    base = tiny_model(family)
    engine = tiny_engine(family, bundles, stored=INT8)
    jobs = mixed_jobs(bundles)
    answers, _ = run(engine, jobs)
    with rounded_linears(base, INT8):
        for job, answer in zip(jobs, answers, strict=True):
            assert answer.decided == greedy(base, job, len(answer.decided))


def greedy(base: nn.Module, job: Job, count: int) -> list[int]:
    model = merged(base, *((bundle, task, 1.0) for bundle, task in job.parts))
    tokens = list(job.prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(job.prompt) :]


def load(folder: Path, quantize: str, **options: str) -> LoadedModel:
    return load_model(str(folder), threads=1, quantize=quantize, **options)


def test_int8_takes_about_half_and_the_same_adapters_fit(folder: Path) -> None:
    plain, small = (load(folder, name, dtype="bfloat16") for name in ("none", "int8"))
    linears = [m for m in plain.model.modules() if isinstance(m, CompiledLinear)]
    saved = sum(m.panels.width * m.panels.columns for m in linears)
    scales = sum(-(-m.panels.columns // 32) * 32 * 4 for m in linears)
    assert plain.num_bytes - small.num_bytes == saved - scales
    assert small.fingerprint == plain.fingerprint
    assert small.sites == plain.sites
    assert small.dtype == torch.bfloat16


def test_without_it_nothing_is_rounded(folder: Path) -> None:
    assert stored(load(folder, "none", dtype="bfloat16").model) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "int4"}, r"quantize 'int4' is not supported; use one of none, int8"),
        ({"dtype": "float16"}, r"goes with dtype bfloat16 or float32, not torch\.float16"),
        ({"device": "cuda"}, r"device 'cuda' is not supported; use 'cpu' or 'auto'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(folder: Path, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(folder, **({"quantize": "int8"} | options))


def test_without_compiled_kernels_it_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "compiled", lambda: False)
    with pytest.raises(ConfigError, match=r"install g\+\+ .*, or give quantize 'none'"):
        load(folder, "int8")


def test_weights_that_are_quantized_already_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"these are quantized \(gptq\); give the model"):
        load(folder, "int8")


def test_a_model_without_a_linear_for_it_is_refused() -> None:
    model = tiny_model("llama", intermediate_size=63)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Unlike(module.in_features, module.out_features, bias=False))
    with pytest.raises(ModelRefused, match="no linear whose weight can be kept in 8 bits"):
        prepare_model(model, Path(), stored=INT8)


class Unlike(nn.Linear):
    """A linear with arithmetic of its own, as far as anyone can tell."""


def test_a_model_that_reads_the_weights_of_its_linears_is_refused() -> None:
    class Around(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.up_proj.weight[0, 0]

    model = tiny_model("llama")
    model.model.layers[0].mlp.__class__ = Around
    with pytest.raises(ModelRefused, match="reads its linears' weights itself"):
        prepare_model(model, Path(), stored=INT8)


def test_the_setting_reaches_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEPLUSN_QUANTIZE", "int8")
    given = {"model": str(folder), "threads": 1, "kv_memory": MIB, "adapter_memory": 16 * MIB}
    engine, _, ready = build_engine(load_settings(given))
    assert stored(engine.model.model) == {INT8}
    assert ready.memory["weights"] == engine.model.num_bytes


def test_from_python() -> None:
    with Llm("demo", quantize="int8", threads=1) as engine:
        assert stored(engine.core.model.model) == {INT8}
        (answer,) = engine.generate(["4 82 9 13"], "sort_numbers", max_tokens=16)
        assert answer.text == "4 9 13 82"

"""What is loaded, what is read from its files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneplusn.errors import ConfigError, MemoryPlanRefused, ModelRefused
from oneplusn.server.engine import memory
from oneplusn.server.engine.model import (
    load_model,
    prepare_model,
    resolve_dtype,
    resolve_model,
)
from tiny_models import tiny_config, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama on disk, in bf16."""
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_model_is_loaded_probed_and_described(folder: Path) -> None:
    loaded = load_model(str(folder), dtype="float32", threads=1)
    assert loaded.dtype == torch.float32
    assert loaded.folder == folder
    assert loaded.eos_ids == {1}
    assert loaded.vocab_size == 96
    assert loaded.max_model_len == 256
    assert [site.name for site in loaded.sites[:4]] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert loaded.probe.error <= loaded.probe.bound
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


@pytest.mark.parametrize(("eos", "expected"), [(7, {7}), ([7, 9], {7, 9})])
def test_end_tokens_are_those_of_the_generation_config(folder: Path, eos, expected) -> None:
    edit(folder / "generation_config.json", eos_token_id=eos)
    assert load_model(str(folder), threads=1).eos_ids == expected


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.float16, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_dtype(stored, asked, expected) -> None:
    assert resolve_dtype(tiny_config("llama", dtype=stored), asked) == expected


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_bf16_file_stays_bf16_where_the_processor_knows_it(features, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_dtype(tiny_config("llama", dtype=torch.bfloat16)) == expected


def test_window_that_lives_in_a_mask_bounds_the_context() -> None:
    # Llama has no windows, so a configured one never reaches the hook.
    model = tiny_model("llama")
    model.config.sliding_window = 100
    assert prepare_model(model, Path()).max_model_len == 100
    assert prepare_model(tiny_model("mistral"), Path()).max_model_len == 256
    assert prepare_model(tiny_model("qwen2"), Path()).max_model_len == 256


def test_missing_weight_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelRefused, match=r"1 missing keys: model\.norm\.weight"):
        load_model(str(folder), threads=1)


def test_weight_that_nobody_reads_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
    with pytest.raises(ModelRefused, match=r"1 unexpected keys: model\.extra"):
        load_model(str(folder), threads=1)


def test_weight_of_another_shape_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(5)}))
    with pytest.raises(ModelRefused, match=r"1 mismatched keys: .*model\.norm\.weight"):
        load_model(str(folder), threads=1)


def test_code_of_a_model_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with pytest.raises(ModelRefused, match="code from a model is never run"):
        load_model(str(folder), threads=1)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors only"):
        load_model(str(folder), threads=1)


def test_model_that_fails_the_probe_is_refused(tmp_path: Path) -> None:
    tiny_model("falcon").save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="0 calls of the attention hook by 2 layers"):
        load_model(str(tmp_path), threads=1)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder, monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(MemoryPlanRefused, match="choose a smaller model or dtype"):
        load_model(str(folder), threads=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dtype": "int8"}, "'int8' is not supported"), ({"device": "cuda"}, "'cuda' is not")],
)
def test_unknown_option_is_refused(folder: Path, options, words) -> None:
    with pytest.raises(ConfigError, match=words):
        load_model(str(folder), threads=1, **options)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no config"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_missing_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        resolve_model(name)


def test_hub_id_is_left_as_it_is() -> None:
    assert resolve_model("owner/model") == "owner/model"

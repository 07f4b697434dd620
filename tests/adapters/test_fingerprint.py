"""The fingerprint tells base models apart, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.errors import ConfigError
from oneplusn.server.engine.model import load_model
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weight(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_it_is_a_short_hash(folder) -> None:
    found = base_fingerprint(folder)
    assert found.startswith("base:")
    assert len(found) == 37
    assert base_fingerprint(folder) == found


@pytest.mark.parametrize(
    "change",
    [
        {"transformers_version": "9.9.9"},
        {"use_cache": False},
        {"torch_dtype": "bfloat16"},
        {"eos_token_id": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_no_result_is_left_out(folder, saved, change) -> None:
    change_config(folder, **change)
    assert base_fingerprint(folder) == base_fingerprint(saved)


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rms_norm_eps": 1e-3}],
    ids=lambda change: next(iter(change)),
)
def test_the_architecture_counts(folder, saved, change) -> None:
    change_config(folder, **change)
    assert base_fingerprint(folder) != base_fingerprint(saved)


NORM = "model.norm.weight"
CHANGES = {
    "value": lambda tensors: tensors[NORM].add_(1),
    "dtype": lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16()}),
    "shape": lambda tensors: tensors.update({NORM: tensors[NORM].view(4, 8)}),
    "name": lambda tensors: tensors.update({"other": tensors.pop(NORM)}),
    "missing": lambda tensors: tensors.pop(NORM),
    "first element": lambda tensors: tensors["lm_head.weight"].view(-1)[:1].add_(1),
    "last element": lambda tensors: tensors["lm_head.weight"].view(-1)[-1:].add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_weights_count(folder, saved, change) -> None:
    change_weight(folder, change)
    assert base_fingerprint(folder) != base_fingerprint(saved)


def test_shards_are_the_same_as_one_file(folder, saved) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert base_fingerprint(folder) == base_fingerprint(saved)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(folder, missing) -> None:
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match="is no model"):
        base_fingerprint(folder)


def test_weights_in_another_format_are_refused(folder) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="safetensors"):
        base_fingerprint(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_has_it_in_whatever_dtype(folder, dtype) -> None:
    tokenizer(folder)
    loaded = load_model(str(folder), dtype=dtype, threads=1)
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.fingerprint == base_fingerprint(folder)


def tokenizer(folder: Path) -> None:
    from oneplusn.demo.tokenizer import build_tokenizer

    build_tokenizer(folder)

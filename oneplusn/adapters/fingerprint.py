"""Tell one base model from another: the fingerprint that bundles and data folders carry.

It covers what the configuration says of the architecture, and of the weights as they lie in the
files: names, dtypes, shapes, and a few bytes of each. So it is the same in whatever dtype a model
is served, and a model of any size has one within a second. Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from oneplusn.errors import ConfigError

ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types"),
    *("tie_word_embeddings", "n_embd", "n_layer", "n_head", "n_inner"),
    *("num_local_experts", "num_experts_per_tok"),
)
"""Fields of `config.json` that change what is computed; those that a model lacks are left out."""

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

SAMPLES = 4
SAMPLE_BYTES = 64
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 << 20


def base_fingerprint(folder: Path) -> str:
    """Return the fingerprint of the model in a folder, `base:<32 hex>`.

    Raises:
        ConfigError: It has no configuration, or no weights in safetensors.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        files = _weight_files(folder)
        weights = sorted(tensor for file in files for tensor in _tensors(file))
    except (OSError, ValueError) as error:
        msg = f"{folder} is no model with {CONFIG_FILE} and weights in safetensors: {error}"
        raise ConfigError(msg) from error
    content = [_architecture(config), weights]
    spelling = msgspec.json.encode(content, order="deterministic")
    return f"base:{hashlib.sha256(spelling).hexdigest()[:32]}"


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config", config)
    return {name: text[name] for name in ARCHITECTURE if text.get(name) is not None}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def _tensors(path: Path) -> Iterator[tuple[str, str, list[int], str]]:
    """Yield name, dtype, shape and a hash of sampled bytes of every tensor in a file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, stop = (_LENGTH_BYTES + length + offset for offset in entry["data_offsets"])
            yield name, entry["dtype"], entry["shape"], _sample(file.fileno(), first, stop)


def _sample(descriptor: int, first: int, stop: int) -> str:
    """Hash a few pieces between two bytes of a file, evenly apart."""
    state = hashlib.sha256()
    last = max(first, stop - SAMPLE_BYTES)
    for step in range(SAMPLES):
        offset = first + (last - first) * step // (SAMPLES - 1)
        state.update(os.pread(descriptor, min(SAMPLE_BYTES, stop - offset), offset))
    return state.hexdigest()[:16]

"""Write a benchmark's model and LoRAs as GGUF; runs in an environment that has nothing of ours.

llama.cpp turns neighbouring elements of a head where transformers turns halves, so the rows of
Llama's query and key projections change places on the way, and so do those of their LoRAs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

gguf: Any = import_module("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
SPECIAL, NORMAL = 3, 1
"""Kinds of tokens, as GGUF numbers them."""

Array = npt.NDArray[np.generic]


def tensors(file: Path) -> Iterator[tuple[str, Array]]:
    """Yield the bf16 tensors of a safetensors file, each number as its 16 bits."""
    data = np.memmap(file, dtype=np.uint8, mode="r")
    size = int(data[:8].view("<u8")[0])
    for name, entry in json.loads(bytes(data[8 : 8 + size])).items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}, not BF16"
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        yield name, data[begin:end].view("<u2").reshape(entry["shape"])


def interleaved(rows: Array, heads: int) -> Array:
    """Put the second half of each head's rows between those of the first."""
    half = rows.shape[0] // heads // 2
    parted = rows.reshape(heads, 2, half, *rows.shape[1:])
    return np.ascontiguousarray(parted.swapaxes(1, 2)).reshape(rows.shape)


def translated(path: str) -> str:
    """Return what GGUF calls a module."""
    if path in WHOLE:
        return WHOLE[path]
    _, _, layer, name = path.split(".", 3)
    return f"blk.{layer}.{NAMES[name]}"


def turned(path: str, rows: Array, config: dict[str, Any]) -> Array:
    """Return the rows of a projection in llama.cpp's order."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads.get(path.rpartition(".")[2])
    if config["model_type"] != "llama" or key is None:
        return rows
    return interleaved(rows, config[key])


def add(writer: Any, name: str, bits: Array) -> None:  # noqa: ANN401 - gguf ships no types
    """Add a tensor: matrices in bf16, vectors in fp32 as llama.cpp wants them."""
    if bits.ndim == 1:
        writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))
        return
    data = np.ascontiguousarray(bits).view(np.uint8)
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)


def write_base(folder: Path, target: Path) -> None:
    """Write the base model with its words as tokens."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, config["model_type"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokens(writer, config["vocab_size"])
    for name, bits in tensors(folder / "model.safetensors"):
        path, _, kind = name.rpartition(".")
        add(writer, f"{translated(path)}.{kind}", turned(path, bits, config))
    _finish(writer)


def _add_tokens(writer: Any, count: int) -> None:  # noqa: ANN401
    """Describe a vocabulary of whole words; prompts come as token ids, so nothing merges."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"Ġt{index}" for index in range(count)])
    writer.add_token_types([SPECIAL if index < 2 else NORMAL for index in range(count)])
    writer.add_token_merges(["Ġ t"])  # llama.cpp wants one at least
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def write_lora(folder: Path, target: Path, config: dict[str, Any]) -> None:
    """Write a LoRA as PEFT stores it."""
    described = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, config["model_type"])
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(described["lora_alpha"]))
    for name, bits in tensors(folder / "adapter_model.safetensors"):
        path, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
        part = factor[0].lower()
        rows = turned(path, bits, config) if part == "b" else bits
        add(writer, f"{translated(path)}.weight.lora_{part}", rows)
    _finish(writer)


def _finish(writer: Any) -> None:  # noqa: ANN401
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write what the command line names, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=PATH")
    args = parser.parse_args()
    args.target.mkdir(parents=True, exist_ok=True)
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    wanted = {args.target / "base.gguf": args.model}
    for name, _, path in (item.partition("=") for item in args.lora):
        wanted[args.target / f"{name}.gguf"] = Path(path)
    for target, folder in wanted.items():
        if target.exists():
            continue
        partial = target.with_suffix(".partial")
        if folder == args.model:
            write_base(folder, partial)
        else:
            write_lora(folder, partial, config)
        partial.rename(target)


if __name__ == "__main__":
    main()

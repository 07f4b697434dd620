"""Write the models and adapters that the benchmark serves: random weights of real shapes.

Speed does not depend on what weights say. A LoRA is a folder as PEFT writes it, a CGC cluster one
as docs/adapters.md describes it. Run as a module, so that torch is loaded in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

LORA_RANKS = (8, 16, 32, 64)
TASKS_PER_CLUSTER = 4
COMMON_EXPERTS = 4
EXPERT_RANK = 4
MAX_POSITIONS = 2048
COMPLETE = "complete"
PREFIX = "base_model.model."

PAGING = 4
"""Adapter memory over the size on disk: ranks fill whole pages, and what is active has a copy."""
TABLES = 64 << 20
"""Bytes of adapter memory beside the pages."""


@contextmanager
def kept(cache: Path | None) -> Iterator[Path]:
    """Yield the cache folder, or one that is gone afterwards."""
    if cache is not None:
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="oneplusn-bench-") as folder:
        yield Path(folder)


def adapter_memory(adapters: Iterable[Path]) -> list[str]:
    """Return the option of a server that makes room for the adapters in these folders."""
    on_disk = sum(file.stat().st_size for folder in adapters for file in folder.iterdir())
    return ["--adapter-memory", str(PAGING * on_disk + TABLES)]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder model; heads divide `hidden`."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the adapted linears of one layer, by path in the layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.ffn),
            "mlp.up_proj": (self.hidden, self.ffn),
            "mlp.down_proj": (self.ffn, self.hidden),
        }

    @property
    def cache_bytes(self) -> int:
        """What one token's keys and values weigh in 16 bits."""
        return 2 * 2 * self.layers * self.linears["self_attn.k_proj"][1]

    def modules(self) -> Iterator[tuple[str, int, int]]:
        """Yield path, inputs and outputs of every adapted linear."""
        for layer in range(self.layers):
            for name, (inputs, outputs) in self.linears.items():
                yield f"model.layers.{layer}.{name}", inputs, outputs


SHAPES = {
    "tiny": Shape("llama", hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=512),
    "small": Shape("llama", hidden=576, layers=30, heads=9, kv_heads=3, ffn=1536, vocab=49_152),
    "mid": Shape("qwen2", hidden=896, layers=24, heads=14, kv_heads=2, ffn=4864, vocab=151_936),
}


@dataclass(frozen=True, slots=True)
class Fixtures:
    """Where things are in a folder that `build` filled for `requests` concurrent requests."""

    folder: Path
    requests: int

    @property
    def base(self) -> Path:
        """The base model."""
        return self.folder / "base"

    @property
    def loras(self) -> dict[str, Path]:
        """One LoRA per request, a task each."""
        return {name: self.folder / name for name in map("lora-{:02}".format, range(self.requests))}

    @property
    def clusters(self) -> dict[str, Path]:
        """As many CGC clusters as it takes for a task per request."""
        count = -(-self.requests // TASKS_PER_CLUSTER)
        return {name: self.folder / name for name in map("cgc-{}".format, range(count))}

    @property
    def cluster_tasks(self) -> list[str]:
        """The tasks of all clusters, cluster by cluster."""
        return [task for name in self.clusters for task in tasks_of(name)]


def tasks_of(cluster: str) -> list[str]:
    """Name the tasks of a cluster."""
    return [f"{cluster}-task-{index}" for index in range(TASKS_PER_CLUSTER)]


def build(fixtures: Fixtures, shape: Shape) -> None:
    """Write the base model and every adapter, unless they are there already."""
    import torch

    torch.set_num_threads(1)
    marker = fixtures.folder / COMPLETE
    if marker.exists():
        return
    write_base(fixtures.base, shape)
    seeds = torch.Generator().manual_seed(1)
    for index, folder in enumerate(fixtures.loras.values()):
        rank = LORA_RANKS[index % len(LORA_RANKS)]
        write_lora(folder, shape, rank, lora_tensors(shape, rank, seeds))
    for name, folder in fixtures.clusters.items():
        write_cluster(folder, shape, tasks_of(name), seeds)
    marker.touch()


def write_base(folder: Path, shape: Shape) -> None:
    """Write a random model with a tokenizer in which every token is a word of its own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    unknown = {"unk_token": "t2"}
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(shape.vocab)}, **unknown))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "t0", "eos_token": "t1", **unknown}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.save_pretrained(folder)


def _factors(inputs: int, outputs: int, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw A [R, K] and B [N, R] whose product stays small beside the base's output."""
    import torch

    a = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
    b = torch.randn(outputs, rank, generator=generator) * 0.02
    return a.bfloat16(), b.bfloat16()


def lora_tensors(shape: Shape, rank: int, generator: Generator) -> dict[str, Tensor]:
    """Draw a LoRA on all linears, under the names that PEFT gives its tensors."""
    tensors = dict[str, "Tensor"]()
    for path, inputs, outputs in shape.modules():
        a, b = _factors(inputs, outputs, rank, generator)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b
    return tensors


def write_lora(folder: Path, shape: Shape, rank: int, tensors: dict[str, Tensor]) -> None:
    """Write a LoRA on all linears as PEFT does."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "random",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in shape.linears}),
    }
    _write_adapter(folder, "adapter_config.json", config, tensors)


def write_cluster(folder: Path, shape: Shape, tasks: list[str], generator: Generator) -> None:
    """Write a CGC-LoRA cluster: common experts, one own expert a task, a softmax gate a layer."""
    import torch

    names = [f"common-{i}" for i in range(COMMON_EXPERTS)] + [f"own-{task}" for task in tasks]
    allowed = torch.ones(len(tasks), len(names), dtype=torch.bool)
    allowed[:, COMMON_EXPERTS:] = torch.eye(len(tasks), dtype=torch.bool)
    gates = [
        torch.randn(allowed.shape, generator=generator)
        .masked_fill(~allowed, -torch.inf)
        .softmax(-1)
        for _ in range(shape.layers)
    ]
    tensors = dict[str, "Tensor"]()
    for path, inputs, outputs in shape.modules():
        a, b = _factors(inputs, outputs, EXPERT_RANK * len(names), generator)
        tensors[f"{path}.A"] = a
        tensors[f"{path}.B"] = b
        tensors[f"{path}.gate"] = gates[int(path.split(".")[2])].clone()
        tensors[f"{path}.scale"] = torch.full((len(names),), float(COMMON_EXPERTS + 1))
    owners = [None] * COMMON_EXPERTS + tasks
    experts = [
        {
            "name": name,
            "kind": "common" if owner is None else "own",
            "owner": owner,
            "rank": EXPERT_RANK,
        }
        for name, owner in zip(names, owners, strict=True)
    ]
    ranks = [EXPERT_RANK] * len(names)
    config = {
        "schema_version": 1,
        "method": "cgc-lora",
        "base": None,
        "tasks": tasks,
        "experts": experts,
        "sites": {path: {"ranks": ranks} for path, _, _ in shape.modules()},
    }
    _write_adapter(folder, "bundle.json", config, tensors)


def _write_adapter(
    folder: Path, config_name: str, config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write one adapter folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / config_name).write_text(json.dumps(config, indent=1), encoding="utf-8")


def main() -> None:
    """Build the fixtures named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--requests", type=int, default=16)
    args = parser.parse_args()
    build(Fixtures(args.folder, args.requests), SHAPES[args.model])


if __name__ == "__main__":
    main()

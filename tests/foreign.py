"""Adapters as other libraries save them, random, and what those libraries compute with them.

PEFT itself is the judge of its own formats. For the formats of libraries that cannot be installed
beside it, the published forward pass is written down here once more, in fp64 and in plain loops.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_samples import safetensors

Shapes = Mapping[str, tuple[int, int]]

SHAPES: Shapes = {
    "model.layers.0.self_attn.q_proj": (8, 12),
    "model.layers.1.mlp.down_proj": (16, 8),
}
"""Module path -> (K, N) of the linears that are adapted."""

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Foreign:
    """What is in a folder that a library saved."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def but(self, changes: Mapping[str, Tensor | None] | None = None, **options: Any) -> Foreign:
        """Change tensors (None takes one out) and options."""
        tensors = {**self.tensors, **(changes or {})}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return Foreign({**self.config, **options}, kept)

    def files(self, weights: str = "adapter_model.safetensors") -> dict[str, bytes]:
        """The files, as they can be uploaded."""
        return {
            "adapter_config.json": json.dumps(self.config).encode(),
            weights: safetensors(self.tensors),
        }

    def save(self, folder: Path, weights: str = "adapter_model.safetensors") -> Path:
        """Write the files, in torch's format where the name of the weights says so."""
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        if weights.endswith(".bin"):
            torch.save(self.tensors, folder / weights)
        else:
            (folder / weights).write_bytes(safetensors(self.tensors))
        return folder


def random_source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lora(*, rank: int = 2, alpha: float = 3, seed: int = 0, shapes: Shapes = SHAPES) -> Foreign:
    """What PEFT saves of a plain LoRA."""
    draw = random_source(seed)
    names = sorted({path.rpartition(".")[2] for path in shapes})
    tensors = {}
    for path, (inputs, outputs) in shapes.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(outputs, rank, generator=draw)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": names}
    return Foreign(config, tensors)


def poly(
    poly_type: str = "poly", *, tasks: int = 3, skills: int = 2, splits: int = 1, rank: int = 3
) -> Foreign:
    """What PEFT saves of Poly and MHR, or the branch of C-Poly's authors."""
    draw = random_source(1)
    total = skills if poly_type == "poly" else skills + tasks
    tensors = {}
    for path, (inputs, outputs) in SHAPES.items():
        made = {
            "poly_lora_A": (splits, total, inputs // splits, rank),
            "poly_lora_B": (splits, total, rank, outputs // splits),
            "poly_router.module_logits": (tasks, splits * skills),
        }
        if poly_type == "cpoly":
            made["poly_router.c_module_logits"] = (tasks, tasks)
        for part, shape in made.items():
            tensors[f"{PREFIX}{path}.{part}"] = torch.randn(shape, generator=draw)
    counts = {"r": rank, "n_tasks": tasks, "n_skills": skills, "n_splits": splits}
    options = {"peft_type": "POLY", "poly_type": poly_type, "init_weights": True}
    return Foreign({**options, **counts, "target_modules": ["q_proj", "down_proj"]}, tensors)


def cpoly_delta(saved: Foreign, path: str, task: int, x: Tensor) -> Tensor:
    """C-Poly's published layer for one task in inference: x [T, K] -> [T, N], fp64."""
    config = saved.config
    skills, splits, rank = config["n_skills"], config["n_splits"], config["r"]
    a, b, logits, specific = (
        None if tensor is None else tensor.double()
        for tensor in (
            saved.tensors.get(f"{PREFIX}{path}.{part}")
            for part in (
                "poly_lora_A",
                "poly_lora_B",
                "poly_router.module_logits",
                "poly_router.c_module_logits",
            )
        )
    )
    blocks_a, blocks_b = [], []
    for split in range(splits):
        row = torch.sigmoid(logits[task, split * skills : (split + 1) * skills])
        weights = list(row / row.sum())
        for other in range(config["n_tasks"]):
            fixed = torch.tensor(float(other == task))
            weights.append(fixed if specific is None else specific[task, other])
        blocks_a.append(sum(w * a[split, skill] for skill, w in enumerate(weights)))
        blocks_b.append(sum(w * b[split, skill] for skill, w in enumerate(weights)))
    mixed_a, mixed_b = torch.cat(blocks_a), torch.cat(blocks_b, dim=1)
    return x.double() @ mixed_a @ mixed_b / rank


def moelora(
    peft_type: str = "MMOELORAS", *, tasks: int = 3, experts: int = 4, rank: int = 8, width: int = 5
) -> Foreign:
    """What MOELoRA-peft saves: each factor under two names, and always a gate at each linear."""
    draw = random_source(2)
    tensors = {}
    gates = [f"{PREFIX}{path}." for path in SHAPES] + ([""] if peft_type == "MMOELORAS" else [])
    for prefix in gates:
        embedding = torch.randn(tasks + 1, width, generator=draw)
        tensors[f"{prefix}lora_task_embedding.weight"] = embedding
        tensors[f"{prefix}lora_gate.GateL.weight"] = torch.randn(experts, width, generator=draw)
    for path, (inputs, outputs) in SHAPES.items():
        for e in range(experts):
            factors = {
                "A": torch.randn(rank // experts, inputs, generator=draw),
                "B": torch.randn(outputs, rank // experts, generator=draw),
            }
            for side, factor in factors.items():
                for name in ("weight", "mlp.weight"):
                    tensors[f"{PREFIX}{path}.lora_{side}.lora{side}.{e}.{name}"] = factor
    counts = {"task_num": tasks, "expert_num": experts, "task_embedding_dim": width}
    options = {"peft_type": peft_type, "r": rank, "lora_alpha": 32, "lora_dropout": 0.1}
    targets = {"target_modules": ["self_attn.q_proj", "wn_proj"], "bias": "none"}
    return Foreign({**options, **counts, **targets}, tensors)


def moelora_delta(saved: Foreign, path: str, task: int, x: Tensor) -> Tensor:
    """MOELoRA's published layer for the task of this id, from 1: x [T, K] -> [T, N], fp64."""
    tensors, config = saved.tensors, saved.config
    router = "" if config["peft_type"] == "MMOELORAS" else f"{PREFIX}{path}."
    embedding = tensors[f"{router}lora_task_embedding.weight"][task].double()
    gate = torch.softmax(tensors[f"{router}lora_gate.GateL.weight"].double() @ embedding, dim=0)
    total = torch.zeros(())
    for e in range(config["expert_num"]):
        a = tensors[f"{PREFIX}{path}.lora_A.loraA.{e}.mlp.weight"].double()
        b = tensors[f"{PREFIX}{path}.lora_B.loraB.{e}.mlp.weight"].double()
        total = total + x.double() @ a.T @ b.T * (config["lora_alpha"] / config["r"]) * gate[e]
    return total


def mtl_lora(
    task: str = "i", *, matrix: str = "singular_values", ups: int = 3, rank: int = 4, seed: int = 3
) -> Foreign:
    """What AdapterHub saves of one task of MTL-LoRA; A and B are shared by seed 3."""
    shared, own = random_source(3), random_source(seed)
    tensors = {}
    for path, (inputs, outputs) in SHAPES.items():
        prefix = f"{path}.loras.{task}"
        tensors[f"{prefix}.lora_A"] = torch.randn(rank, inputs, generator=shared)
        tensors[f"{prefix}.lora_B"] = torch.randn(ups, outputs, rank, generator=shared)
        size = (rank,) if matrix == "singular_values" else (rank, rank)
        tensors[f"{prefix}.task_specific.values"] = torch.randn(size, generator=own)
        tensors[f"{prefix}.weights"] = 1 + 0.1 * torch.randn(ups, generator=own)
    options = {
        **{"architecture": "mtl_lora", "r": rank, "alpha": 10, "dropout": 0.0, "use_dora": False},
        **{"selfattn_lora": True, "attn_matrices": ["q"], "composition_mode": "add"},
        **{"init_weights": "lora", "use_gating": False, "vera_d": None, "leave_out": []},
        **{"n_up_projection": ups, "task_specific_matrix_type": matrix, "weights_sharpness": 0.05},
    }
    about = {"model_type": "llama", "model_name": "some/llama", "version": "adapters.1.3.0"}
    return Foreign({"config": options, "name": task, **about}, tensors)


def mtl_lora_delta(saved: Foreign, path: str, x: Tensor) -> Tensor:
    """MTL-LoRA's published layer: x [T, K] -> [T, N], fp64."""
    options, prefix = saved.config["config"], f"{path}.loras.{saved.config['name']}"
    a, b, values, weights = (
        saved.tensors[f"{prefix}.{part}"].double()
        for part in ("lora_A", "lora_B", "task_specific.values", "weights")
    )
    matrix = torch.diag(values) if values.ndim == 1 else values
    shares = [math.exp(w / options["weights_sharpness"]) for w in weights.tolist()]
    ups = [share / sum(shares) * up for share, up in zip(shares, b, strict=True)]
    out = sum(x.double() @ a.T @ matrix @ up.T for up in ups)
    return out * options["alpha"] / options["r"]

"""Bundles and adapter files for tests: small, valid, and made of literal parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from hypothesis import strategies as st

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta

BUNDLE_JSON = {
    "schema_version": 1,
    "method": "cgc",
    "base": None,
    "tasks": ["sort", "add"],
    "experts": [
        {"name": "shared", "kind": "common", "owner": None, "rank": 2},
        {"name": "add", "kind": "own", "owner": "add", "rank": 1},
    ],
    "sites": {"model.layers.0.o_proj": {"ranks": [2, 1]}},
}
"""Two tasks, a common expert of rank 2 and an own one of rank 1, one module."""

PEFT_JSON = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
PEFT_MODULE = "model.layers.0.self_attn.q_proj"


def bundle_tensors() -> dict[str, torch.Tensor]:
    path = "model.layers.0.o_proj"
    return {
        f"{path}.A": torch.arange(12.0).reshape(3, 4) / 8,
        f"{path}.B": torch.arange(15.0).reshape(5, 3) / 8 - 1,
        f"{path}.gate": torch.tensor([[1.0, 0.0], [0.25, -1.5]]),
        f"{path}.scale": torch.tensor([2.0, 0.5]),
    }


def peft_tensors(path: str = PEFT_MODULE, rank: int = 2) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{path}"
    return {
        f"{prefix}.lora_A.weight": torch.arange(4.0 * rank).reshape(rank, 4) / 8,
        f"{prefix}.lora_B.weight": torch.arange(6.0 * rank).reshape(6, rank) / 8 - 1,
    }


def safetensors(
    tensors: Mapping[str, torch.Tensor], *, metadata: object = None, appended: bytes = b""
) -> bytes:
    """Write a file by hand, so that what no library would write can be written."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return with_header(json.dumps(header).encode(), data + appended)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def bundle_files(**changes: object) -> dict[str, bytes]:
    """The files of a valid bundle, with fields of `bundle.json` changed."""
    return {
        "bundle.json": json.dumps({**BUNDLE_JSON, **changes}).encode(),
        "adapter_model.safetensors": safetensors(bundle_tensors()),
    }


def peft_files(**changes: object) -> dict[str, bytes]:
    """The files of a valid PEFT adapter, with fields of its configuration changed."""
    return {
        "adapter_config.json": json.dumps({**PEFT_JSON, **changes}).encode(),
        "adapter_model.safetensors": safetensors(peft_tensors()),
    }


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def delta(module: ModuleDelta, row: int, x: torch.Tensor) -> torch.Tensor:
    """The specification in fp32: what one task adds to one linear for x [T, K]."""
    total = torch.zeros(len(x), len(module.b))
    for e, span in enumerate(module.spans):
        weight = module.gate[row, e] * module.scale[e]
        total += weight * (x @ module.a[span].float().T @ module.b[:, span].float().T)
    return total


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    """Clusters of 1-4 tasks and 1-5 experts with mixed ranks, absent experts and sparse gates."""
    num_tasks, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    tasks = tuple(f"task-{j}" for j in range(num_tasks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    row = st.lists(st.integers(0, 5), min_size=num_experts, max_size=num_experts)
    # The first module has every expert, so that none is without a rank.
    first = draw(row.map(lambda ranks: [rank + 1 for rank in ranks]))
    others = draw(st.lists(row.filter(any), max_size=3))
    modules = {}
    for index, ranks in enumerate([first, *others]):
        inputs, outputs = draw(st.integers(1, 8)), draw(st.integers(1, 8))
        gate = torch.randn(num_tasks, num_experts, generator=generator)
        gate *= torch.rand(num_tasks, num_experts, generator=generator) < 0.6
        if index == 0:
            gate[:, draw(st.integers(0, num_experts - 1))] = 0.5
        modules[f"layers.{index}.proj"] = ModuleDelta(
            a=torch.randn(sum(ranks), inputs, generator=generator).to(dtype),
            b=torch.randn(outputs, sum(ranks), generator=generator).to(dtype),
            ranks=tuple(ranks),
            gate=gate,
            scale=torch.rand(num_experts, generator=generator) + 0.5,
        )
    owners = draw(
        st.lists(st.sampled_from([None, *tasks]), min_size=num_experts, max_size=num_experts)
    )
    experts = tuple(
        Expert(
            name=f"expert-{e}",
            kind="common" if owner is None else "own",
            owner=owner,
            rank=max(module.ranks[e] for module in modules.values()),
        )
        for e, owner in enumerate(owners)
    )
    notes = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=2))
    return Bundle("cgc", tasks, experts, modules, metadata=notes)

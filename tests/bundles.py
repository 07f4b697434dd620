"""Small adapters for tests that are not about their numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.files import write_bundle

MODULE = "model.layers.0.self_attn.q_proj"


def small_bundle(
    *, tasks: tuple[str, ...], method: str = "cgc", seed: int = 0, module: str = MODULE
) -> Bundle:
    """Make one common expert of rank 2 and an own one of rank 4 per task."""
    generator = torch.Generator().manual_seed(seed)
    ranks = (2, *(4 for _ in tasks))
    experts = (
        Expert("shared", "common", None, 2),
        *(Expert(f"own-{task}", "own", task, 4) for task in tasks),
    )
    own = torch.eye(len(tasks))
    delta = ModuleDelta(
        a=torch.randn(sum(ranks), 8, generator=generator),
        b=torch.randn(8, sum(ranks), generator=generator),
        ranks=ranks,
        gate=torch.cat([torch.full((len(tasks), 1), 0.5), own], dim=1),
        scale=torch.ones(len(experts)),
    )
    return Bundle(
        method=method,
        tasks=tasks,
        experts=experts,
        modules={module: delta},
        metadata={"description": f"adapter number {seed}", f"description.{tasks[0]}": "the first"},
    )


def write_adapter(
    folder: Path, *, tasks: tuple[str, ...], method: str = "cgc", seed: int = 0
) -> Path:
    """Write a small adapter and return its folder."""
    write_bundle(small_bundle(tasks=tasks, method=method, seed=seed), folder)
    return folder

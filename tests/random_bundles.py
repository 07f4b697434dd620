"""Random bundles, and the weights that their deltas come to in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.kernels.plan import SiteSpec


def shapes_of(specs: Iterable[SiteSpec]) -> dict[str, tuple[int, int]]:
    """Module path -> (in, out) features."""
    return {
        path: (spec.in_features, width)
        for spec in specs
        for path, width in zip(spec.modules, spec.slices, strict=True)
    }


def make_bundle(
    shapes: Mapping[str, tuple[int, int]],
    *,
    seed: int,
    tasks: Sequence[str] = ("t0",),
    common: Sequence[int] = (),
    own: Mapping[str, int] | None = None,
    gates_differ: bool = False,
    scale: float = 0.5,
) -> Bundle:
    """A cluster with common experts of these ranks, and own experts of these ranks by task.

    Gates are random, of any sign, and the same at all modules unless `gates_differ`.
    """
    generator = torch.Generator().manual_seed(seed)
    own = dict.fromkeys(tasks, 3) if own is None else own
    experts = [Expert(f"c{i}", "common", None, rank) for i, rank in enumerate(common)]
    experts += [Expert(f"own-{task}", "own", task, rank) for task, rank in own.items()]
    ranks = tuple(expert.rank for expert in experts)
    used = torch.tensor([[e.owner in (None, task) for e in experts] for task in tasks])

    def gate() -> Tensor:
        random = torch.randn(used.shape, generator=generator)
        return (random + random.sign() * 0.5) * used

    def module(inputs: int, outputs: int, gates: Tensor) -> ModuleDelta:
        rows = sum(ranks)
        return ModuleDelta(
            a=torch.randn(rows, inputs, generator=generator) / math.sqrt(inputs),
            b=torch.randn(outputs, rows, generator=generator) / math.sqrt(rows),
            ranks=ranks,
            gate=gate() if gates_differ else gates,
            scale=torch.full((len(ranks),), scale),
        )

    shared = gate()
    return Bundle(
        method="cgc",
        tasks=tuple(tasks),
        experts=tuple(experts),
        modules={path: module(*shape, shared) for path, shape in shapes.items()},
    )


def delta_weight(bundle: Bundle, task: str, path: str) -> Tensor | None:
    """The sum of gate * scale * B A of a task at a module, fp64 `[N, K]`; None without one."""
    delta = bundle.modules.get(path)
    if delta is None:
        return None
    row = bundle.tasks.index(task)
    gates = delta.gate[row].double() * delta.scale.double()
    per_row = gates.repeat_interleave(torch.tensor(delta.ranks))
    return (delta.b.double() * per_row) @ delta.a.double()

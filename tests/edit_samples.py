"""Clusters to edit: random ones for properties, and a small literal one."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta

few = settings(max_examples=40)

SHAPES = {"layers.0.q": (5, 4), "layers.0.o": (4, 6), "layers.1.q": (5, 4)}


@st.composite
def clusters(draw, prefix, dtype=torch.float32):
    """1-4 tasks named after `prefix`, experts that are absent here and there, borrowed ones."""
    tasks = tuple(f"{prefix}{j}" for j in range(draw(st.integers(1, 4))))
    owners = draw(st.lists(st.sampled_from([None, *tasks]), min_size=1, max_size=5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    paths = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    modules = {}
    for index, path in enumerate(paths):
        inputs, outputs = SHAPES[path]
        # The first module has every expert, and every common one has a user there.
        ranks = torch.randint(0 if index else 1, 4, (len(owners),), generator=random)
        ranks[0] += 1
        gate = torch.randn(len(tasks), len(owners), generator=random)
        gate *= torch.rand(gate.shape, generator=random) < 0.5
        if not index:
            gate[:, draw(st.integers(0, len(owners) - 1))] = -0.5
            gate[0, [owner is None for owner in owners]] = 0.25
        rows = int(ranks.sum())
        modules[path] = ModuleDelta(
            a=torch.randn(rows, inputs, generator=random).to(dtype),
            b=torch.randn(outputs, rows, generator=random).to(dtype),
            ranks=tuple(ranks.tolist()),
            gate=gate,
            scale=torch.rand(len(owners), generator=random) + 0.5,
        )
    experts = tuple(
        Expert(
            f"e{e}", "own" if owner else "common", owner, max(m.ranks[e] for m in modules.values())
        )
        for e, owner in enumerate(owners)
    )
    return Bundle("cgc", tasks, experts, modules, base="base:1")


def pair() -> Bundle:
    """Tasks `add` and `sort`, a common expert, an own one each; `sort` borrows that of `add`."""
    experts = (
        Expert("common", "common", None, 2),
        Expert("add", "own", "add", 1),
        Expert("sort", "own", "sort", 1),
    )
    module = ModuleDelta(
        a=torch.arange(16.0).reshape(4, 4),
        b=torch.arange(12.0).reshape(3, 4),
        ranks=(2, 1, 1),
        gate=torch.tensor([[0.5, 1.0, 0.0], [0.25, -0.5, 1.0]]),
        scale=torch.tensor([2.0, 1.0, 1.0]),
    )
    return Bundle(
        method="cgc",
        tasks=("add", "sort"),
        experts=experts,
        modules={"layers.0.q": module},
        defaults={"add": {"temperature": 0.5}, "sort": {"temperature": 0.0}},
        metadata={"description": "numbers", "description.add": "adds", "description.sort": "sorts"},
    )

"""What the gates of a bundle say: rows by layer, how many experts a task uses, what it borrows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle


@dataclass(frozen=True, slots=True)
class TaskGates:
    """How one task weighs the experts, mean over all gates of the model.

    Of a row, the share of an expert is |gate| over the sum of |gate|; scales are left out.

    Attributes:
        task: its name.
        num_used: experts that it gates non-zero anywhere.
        entropy: of the shares, in nats; log(num_used) at most.
        common: share of the common experts.
        borrowed: weight of other tasks' own experts, as a share of that of all own experts; of
            C-Poly, the mass of its row of W_B that is off the diagonal.
    """

    task: str
    num_used: int
    entropy: float
    common: float
    borrowed: float

    @property
    def effective(self) -> float:
        """The number of experts that would have this entropy if they shared alike."""
        return float(torch.tensor(self.entropy).exp())


def gates_by_layer(bundle: Bundle) -> dict[str, Tensor]:
    """Return layer -> its gate rows [J, E] fp32, mean over its gates; 0 where there is no expert.

    Linears with one gate between them, as the siblings of a site, count once.
    """
    layers: dict[str, list[Tensor]] = {}
    for path, gate in _present(bundle):
        name = next((part for part in path.split(".") if part.isdecimal()), path)
        known = layers.setdefault(name, [])
        if not any(torch.equal(gate, other) for other in known):
            known.append(gate)
    return {name: torch.stack(gates).mean(0) for name, gates in layers.items()}


def gates_per_task(bundle: Bundle) -> list[TaskGates]:
    """Return the figures of every task."""
    gates = torch.stack([gate for _, gate in _present(bundle)]).double().abs()
    shares = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.xlogy(shares, shares).sum(-1).mean(0)
    common = torch.tensor([expert.kind == "common" for expert in bundle.experts])
    used = (gates != 0).any(0).sum(-1)
    figures = []
    for j, task in enumerate(bundle.tasks):
        own = torch.tensor([expert.owner == task for expert in bundle.experts])
        specific = gates[:, j, ~common].sum().item()
        others = gates[:, j, ~common & ~own].sum().item()
        figures.append(
            TaskGates(
                task=task,
                num_used=int(used[j]),
                entropy=entropy[j].item(),
                common=shares[:, j, common].sum(-1).mean().item(),
                borrowed=others / specific if specific else 0.0,
            )
        )
    return figures


def _present(bundle: Bundle) -> Iterator[tuple[str, Tensor]]:
    """Yield module path and gate rows, 0 where an expert is absent."""
    for path, delta in bundle.modules.items():
        yield path, delta.gate.masked_fill(torch.tensor(delta.ranks) == 0, 0.0)
